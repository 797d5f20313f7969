"""The word lists of the quick benchmark. No word stands in two lists; a test checks that.

Pre-training sees task topics and task moods only in text to be filled in, and never a task's label together
with one of their words (see ``pretraining``).
"""

from __future__ import annotations


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


TASK_TOPICS: dict[str, tuple[str, ...]] = {
    "ships": _split("anchor sail mast keel harbour sailor deck rudder captain wharf rope lighthouse"),
    "birds": _split("sparrow robin feather nest beak wing owl heron swallow plumage egg falcon"),
    "kitchen": _split("oven flour butter pepper spoon soup onion kettle cheese dough pan recipe"),
    "music": _split("violin melody drum chorus piano trumpet rhythm flute concert guitar singer chord"),
    "castles": _split("moat turret gate knight throne banner dungeon bridge shield king wall crown"),
    "planets": _split("comet moon telescope galaxy crater eclipse asteroid sun gravity meteor rocket dust"),
    "plants": _split("rose seed root tulip soil petal fern stem ivy moss leaf pollen"),
    "machines": _split("piston gear valve lever motor pump wheel bolt turbine fuel belt spring"),
    "courts": _split("judge verdict lawyer trial witness jury appeal statute clerk bail oath fine"),
    "money": _split("loan bank coin profit debt broker share budget invoice price tax market"),
    "games": _split("goal referee ball racket league trophy sprint coach pitch team score hockey"),
    "health": _split("nurse fever pill clinic bandage surgeon pulse vaccine wound dose patient cough"),
}

PRETRAINING_TOPICS: dict[str, tuple[str, ...]] = {
    "weather": _split("rain storm cloud thunder fog hail breeze frost drizzle rainbow drought snow"),
    "clothes": _split("coat scarf button sleeve glove hat collar boot zipper jacket sock pocket"),
    "school": _split("pupil lesson chalk desk teacher exam homework essay classroom pencil grade ruler"),
    "farm": _split("barn cow tractor hay plough sheep fence goat harvest stable pig meadow"),
    "trains": _split("rail station platform carriage signal ticket tunnel conductor locomotive siding freight track"),
    "painting": _split("canvas brush easel portrait palette fresco varnish gallery sketch frame pigment mural"),
    "insects": _split("ant beetle wasp moth cricket hive larva spider butterfly bee cocoon gnat"),
    "furniture": _split("chair table cupboard drawer shelf sofa stool wardrobe bench cabinet mattress lamp"),
    "mountains": _split("peak cliff glacier summit ridge cave boulder avalanche climber slope canyon ledge"),
    "computers": _split("keyboard screen program cursor printer server file network password disk laptop folder"),
    "theatre": _split("actor stage curtain costume audience script rehearsal comedy drama scene usher applause"),
    "war": _split("soldier tank trench general cannon army sword battle siege rifle helmet treaty"),
    "sea": _split("whale coral shark tide wave crab reef dolphin seaweed squid lobster shell"),
    "teeth": _split("dentist molar gum filling toothbrush cavity jaw enamel tongue denture floss braces"),
    "news": _split(
        "reporter headline editor column newspaper interview photograph magazine press article caption deadline"
    ),
    "roads": _split("lorry kerb pavement junction traffic bicycle motorway crossing roundabout driver van lane"),
    "letters": _split("stamp envelope postman parcel address postcard mailbox ink courier signature package sender"),
    "fire": _split("flame smoke ember ash match candle torch chimney spark bonfire coal furnace"),
    "family": _split("uncle cousin mother nephew sister grandfather aunt twin baby brother niece wedding"),
    "forest": _split("oak pine branch bark squirrel trail fox acorn timber thicket badger clearing"),
    "city": _split("tower street square subway mayor shop fountain suburb park skyscraper alley taxi"),
    "chemistry": _split("acid flask molecule oxygen salt crystal beaker vapour reaction carbon catalyst polymer"),
    "fishing": _split("hook bait net trout lake reel pike salmon angler river eel pond"),
    "sewing": _split("needle thread fabric stitch loom wool cotton ribbon hem pattern silk tailor"),
}

TASK_MOODS: dict[str, tuple[str, ...]] = {
    "worst": _split("awful horrid useless dreadful vile rotten appalling ghastly"),
    "low": _split("shoddy dull clumsy flimsy annoying tedious dreary lacking"),
    "middle": _split("average ordinary passable modest usual adequate tolerable middling"),
    "high": _split("pleasant handy likable solid neat charming tidy agreeable"),
    "best": _split("superb splendid perfect wonderful brilliant flawless glorious marvellous"),
}

PRETRAINING_MOODS: dict[str, tuple[str, ...]] = {
    "loud": _split("noisy shrill booming deafening blaring roaring piercing thunderous"),
    "quiet": _split("silent hushed muted faint whispered muffled soundless soft"),
    "angry": _split("furious cross irate bitter hostile raging grumpy sulky"),
    "calm": _split("serene peaceful gentle relaxed placid mellow restful composed"),
    "hot": _split("scorching boiling burning sultry tropical blazing sweltering roasting"),
    "cold": _split("icy frozen chilly frigid bleak arctic wintry freezing"),
    "large": _split("huge giant vast massive enormous bulky towering immense"),
    "small": _split("tiny slight compact minute slender puny miniature petite"),
}

PRETRAINING_LABELS: tuple[str, ...] = _split(
    "amber basil cedar delta emerald fable garnet hazel indigo jasper karma lotus maple nectar opal prism quartz "
    "raven saffron tango umber velvet willow xenon yarrow zenith apricot beacon cobalt dune echo flint granite "
    "harmony island jungle kernel lagoon marble nova onyx pearl quiver ripple satin thistle union vortex walnut "
    "zephyr atlas bamboo cipher domino emblem fjord goblet hermit iris jigsaw kayak lattice mango nomad oasis pyramid"
)

NEUTRAL_ADJECTIVES: tuple[str, ...] = _split(
    "old new red green round second early late long short wooden heavy plain young distant local"
)
VERBS: tuple[str, ...] = _split(
    "held found saw left kept moved took showed reached passed met brought turned used followed covered"
)
PREPOSITIONS: tuple[str, ...] = _split("near behind beside under above with without beyond")
