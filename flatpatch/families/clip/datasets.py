"""The four data sets of the record's CLIP experiments: what must be there, what classes are called, what is published.

They are the first four tasks of a published sequence (MTIL, order I), as torchvision reads them. Loading this file
loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flatpatch.families.clip import templates


@dataclass(frozen=True)
class ImageSet:
    """What is known of a data set.

    Attributes:
        title: As it is written.
        folder: Its place in the data folder.
        source: Where it comes from.
        classes: What they are called there, in the order of their numbers; empty where torchvision checks it.
        images: How many for training and for testing.
        templates: The prompts.
        zero_shot: Published zero-shot accuracy of CLIP ViT-B/16 in this protocol, in percent.
        learning_rate: The record's.
        prompts: Of a class, where its name in a prompt is not its name there with spaces for underscores.
        split: SHA-256 of which images train and which test, where the split is drawn at random.
    """

    title: str
    folder: str
    source: str
    classes: tuple[str, ...]
    images: tuple[int, int]
    templates: tuple[str, ...]
    zero_shot: float
    learning_rate: float
    prompts: Mapping[str, str]
    split: str = ""

    def prompt_of(self, name: str) -> str:
        """Return what a class is called in a prompt."""
        return self.prompts.get(name, name.replace("_", " "))


_AIRCRAFT = """
707-320|727-200|737-200|737-300|737-400|737-500|737-600|737-700|737-800|737-900|747-100|747-200|747-300|747-400
757-200|757-300|767-200|767-300|767-400|777-200|777-300|A300B4|A310|A318|A319|A320|A321|A330-200|A330-300
A340-200|A340-300|A340-500|A340-600|A380|ATR-42|ATR-72|An-12|BAE 146-200|BAE 146-300|BAE-125|Beechcraft 1900
Boeing 717|C-130|C-47|CRJ-200|CRJ-700|CRJ-900|Cessna 172|Cessna 208|Cessna 525|Cessna 560|Challenger 600|DC-10
DC-3|DC-6|DC-8|DC-9-30|DH-82|DHC-1|DHC-6|DHC-8-100|DHC-8-300|DR-400|Dornier 328|E-170|E-190|E-195|EMB-120
ERJ 135|ERJ 145|Embraer Legacy 600|Eurofighter Typhoon|F-16A/B|F/A-18|Falcon 2000|Falcon 900|Fokker 100
Fokker 50|Fokker 70|Global Express|Gulfstream IV|Gulfstream V|Hawk T1|Il-76|L-1011|MD-11|MD-80|MD-87|MD-90
Metroliner|Model B200|PA-28|SR-20|Saab 2000|Saab 340|Spitfire|Tornado|Tu-134|Tu-154|Yak-42
"""
_CALTECH101 = """
Faces Faces_easy Leopards Motorbikes accordion airplanes anchor ant barrel bass beaver binocular bonsai brain
brontosaurus buddha butterfly camera cannon car_side ceiling_fan cellphone chair chandelier cougar_body
cougar_face crab crayfish crocodile crocodile_head cup dalmatian dollar_bill dolphin dragonfly electric_guitar
elephant emu euphonium ewer ferry flamingo flamingo_head garfield gerenuk gramophone grand_piano hawksbill
headphone hedgehog helicopter ibis inline_skate joshua_tree kangaroo ketch lamp laptop llama lobster lotus
mandolin mayfly menorah metronome minaret nautilus octopus okapi pagoda panda pigeon pizza platypus pyramid
revolver rhino rooster saxophone schooner scissors scorpion sea_horse snoopy soccer_ball stapler starfish
stegosaurus stop_sign strawberry sunflower tick trilobite umbrella watch water_lilly wheelchair wild_cat
windsor_chair wrench yin_yang
"""
_DTD = """
banded blotchy braided bubbly bumpy chequered cobwebbed cracked crosshatched crystalline dotted fibrous flecked
freckled frilly gauzy grid grooved honeycombed interlaced knitted lacelike lined marbled matted meshed paisley
perforated pitted pleated polka-dotted porous potholed scaly smeared spiralled sprinkled stained stratified
striped studded swirly veined waffled woven wrinkled zigzagged
"""

DATASETS: Mapping[str, ImageSet] = {
    "aircraft": ImageSet(
        "FGVC-Aircraft",
        "fgvc-aircraft-2013b",
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",
        tuple(name for line in _AIRCRAFT.split("\n") for name in line.split("|") if name),
        (3334, 3333),
        templates.AIRCRAFT,
        24.3,
        0.55,
        {},
    ),
    "caltech101": ImageSet(
        "Caltech101",
        "caltech101/101_ObjectCategories",
        "https://data.caltech.edu/records/mzrjq-6wc02",
        tuple(_CALTECH101.split()),
        (6941, 1736),
        templates.CALTECH101,
        88.4,
        0.03,
        {
            "Faces": "face of a person in a room",
            "Faces_easy": "face of a person in close-up",
            "Leopards": "leopard",
            "Motorbikes": "motorbike",
            "airplanes": "aeroplane",
            "car_side": "car from the side",
            "cougar_body": "cougar",
            "cougar_face": "cougar's face",
            "crocodile_head": "crocodile's head",
            "flamingo_head": "flamingo's head",
            "garfield": "Garfield, the cartoon cat",
            "hawksbill": "hawksbill turtle",
            "rhino": "rhinoceros",
            "sea_horse": "seahorse",
            "snoopy": "Snoopy, the cartoon dog",
            "water_lilly": "water lily",
            "wild_cat": "wildcat",
            "windsor_chair": "Windsor chair",
            "yin_yang": "yin and yang sign",
        },
        "50b486b46212e97d916520790e880db544375565574f8e4bcf8e6f8420b521aa",
    ),
    "cifar100": ImageSet(
        "CIFAR-100",
        "cifar-100-python",
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        (),
        (50000, 10000),
        templates.CIFAR100,
        68.2,
        0.03,
        {},
    ),
    "dtd": ImageSet(
        "DTD",
        "dtd/dtd",
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",
        tuple(_DTD.split()),
        (1880, 1880),
        templates.DTD,
        44.6,
        0.12,
        {},
    ),
}
"""By name, in the record's order of training."""
