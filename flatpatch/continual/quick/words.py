"""The word lists of the quick benchmark. No word stands in two lists; a test checks that.

Pre-training sees task topics, task moods and task labels only in text to be filled in, and never a label
together with a word it stands for (see ``pretraining``).
"""

from __future__ import annotations

TASK_TOPICS: dict[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "ships": "anchor sail mast keel harbour sailor deck rudder captain wharf rope lighthouse",
        "birds": "sparrow robin feather nest beak wing owl heron swallow plumage egg falcon",
        "kitchen": "oven flour butter pepper spoon soup onion kettle cheese dough pan recipe",
        "music": "violin melody drum chorus piano trumpet rhythm flute concert guitar singer chord",
        "castles": "moat turret gate knight throne banner dungeon bridge shield king wall crown",
        "planets": "comet moon telescope galaxy crater eclipse asteroid sun gravity meteor rocket dust",
        "plants": "rose seed root tulip soil petal fern stem ivy moss leaf pollen",
        "machines": "piston gear valve lever motor pump wheel bolt turbine fuel belt spring",
        "courts": "judge verdict lawyer trial witness jury appeal statute clerk bail oath fine",
        "money": "loan bank coin profit debt broker share budget invoice price tax market",
        "games": "goal referee ball racket league trophy sprint coach pitch team score hockey",
        "health": "nurse fever pill clinic bandage surgeon pulse vaccine wound dose patient cough",
    }.items()
}

PRETRAINING_TOPICS: dict[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "weather": "rain storm cloud thunder fog hail breeze frost drizzle rainbow drought snow",
        "clothes": "coat scarf button sleeve glove hat collar boot zipper jacket sock pocket",
        "school": "pupil lesson chalk desk teacher exam homework essay classroom pencil grade ruler",
        "farm": "barn cow tractor hay plough sheep fence goat harvest stable pig meadow",
        "trains": "rail station platform carriage signal ticket tunnel conductor locomotive siding freight track",
        "painting": "canvas brush easel portrait palette fresco varnish gallery sketch frame pigment mural",
        "insects": "ant beetle wasp moth cricket hive larva spider butterfly bee cocoon gnat",
        "furniture": "chair table cupboard drawer shelf sofa stool wardrobe bench cabinet mattress lamp",
        "mountains": "peak cliff glacier summit ridge cave boulder avalanche climber slope canyon ledge",
        "computers": "keyboard screen program cursor printer server file network password disk laptop folder",
        "theatre": "actor stage curtain costume audience script rehearsal comedy drama scene usher applause",
        "war": "soldier tank trench general cannon army sword battle siege rifle helmet treaty",
        "sea": "whale coral shark tide wave crab reef dolphin seaweed squid lobster shell",
        "teeth": "dentist molar gum filling toothbrush cavity jaw enamel tongue denture floss braces",
        "news": "reporter headline editor column newspaper interview photograph magazine press article caption deadline",
        "roads": "lorry kerb pavement junction traffic bicycle motorway crossing roundabout driver van lane",
        "letters": "stamp envelope postman parcel address postcard mailbox ink courier signature package sender",
        "fire": "flame smoke ember ash match candle torch chimney spark bonfire coal furnace",
        "family": "uncle cousin mother nephew sister grandfather aunt twin baby brother niece wedding",
        "forest": "oak pine branch bark squirrel trail fox acorn timber thicket badger clearing",
        "city": "tower street square subway mayor shop fountain suburb park skyscraper alley taxi",
        "chemistry": "acid flask molecule oxygen salt crystal beaker vapour reaction carbon catalyst polymer",
        "fishing": "hook bait net trout lake reel pike salmon angler river eel pond",
        "sewing": "needle thread fabric stitch loom wool cotton ribbon hem pattern silk tailor",
    }.items()
}

TASK_MOODS: dict[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "worst": "awful horrid useless dreadful vile rotten appalling ghastly",
        "low": "shoddy dull clumsy flimsy annoying tedious dreary lacking",
        "middle": "average ordinary passable modest usual adequate tolerable middling",
        "high": "pleasant handy likable solid neat charming tidy agreeable",
        "best": "superb splendid perfect wonderful brilliant flawless glorious marvellous",
    }.items()
}

PRETRAINING_MOODS: dict[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "loud": "noisy shrill booming deafening blaring roaring piercing thunderous",
        "quiet": "silent hushed muted faint whispered muffled soundless soft",
        "angry": "furious cross irate bitter hostile raging grumpy sulky",
        "calm": "serene peaceful gentle relaxed placid mellow restful composed",
        "hot": "scorching boiling burning sultry tropical blazing sweltering roasting",
        "cold": "icy frozen chilly frigid bleak arctic wintry freezing",
        "large": "huge giant vast massive enormous bulky towering immense",
        "small": "tiny slight compact minute slender puny miniature petite",
    }.items()
}

PRETRAINING_LABELS: tuple[str, ...] = tuple(
    (
        "amber basil cedar delta emerald fable garnet hazel indigo jasper karma lotus maple nectar opal prism quartz "
        "raven saffron tango umber velvet willow xenon yarrow zenith apricot beacon cobalt dune echo flint granite "
        "harmony island jungle kernel lagoon marble nova onyx pearl quiver ripple satin thistle union vortex walnut zephyr "
        "atlas bamboo cipher domino emblem fjord goblet hermit iris jigsaw kayak lattice mango nomad oasis pyramid"
    ).split()
)

NEUTRAL_ADJECTIVES: tuple[str, ...] = tuple(
    "old new red green round second early late long short wooden heavy plain young distant local".split()
)
VERBS: tuple[str, ...] = tuple(
    "held found saw left kept moved took showed reached passed met brought turned used followed covered".split()
)
PREPOSITIONS: tuple[str, ...] = tuple("near behind beside under above with without beyond".split())
