"""The real photographs and scanned forms: what each shows, in words, and how they are varied.

The names come from the packages (scikit-image, ImageNet classes of foolbox, scikit-learn); captions and
questions were written for this project by looking at the pictures. Everything said can be seen in the whole
picture.
"""

import random
from dataclasses import dataclass
from pathlib import Path

from llava_layout import Turns
from PIL import Image

# file: (name, caption, questions). All of it holds for the whole picture and for its mirror image.
PHOTOGRAPHS: dict[str, tuple[str, str, Turns]] = {
    "skimage/photos/astronaut.png": (
        "an astronaut",
        "An astronaut in an orange suit smiles in front of a flag and a model of a space shuttle.",
        [("What colour is the suit?", "Orange."), ("Who is in the picture?", "An astronaut.")],
    ),
    "skimage/photos/brick.png": (
        "a brick wall",
        "A brick wall in gray.",
        [("What is the wall made of?", "Bricks.")],
    ),
    "skimage/photos/camera.png": (
        "a man with a camera",
        "A man in a dark coat looks through a camera on a tripod, in black and white.",
        [
            ("What does the camera stand on?", "A tripod."),
            ("Is the photo in colour?", "No, it is black and white."),
        ],
    ),
    "skimage/photos/chelsea.png": (
        "a cat",
        "The face of a tabby cat with green eyes.",
        [("Which animal is it?", "A cat."), ("What colour are the eyes?", "Green.")],
    ),
    "skimage/photos/chessboard_GRAY.png": (
        "a chessboard",
        "A chessboard of black and white squares.",
        [("Which colours are the squares?", "Black and white.")],
    ),
    "skimage/photos/coffee.png": (
        "a cup of coffee",
        "A cup of coffee on a red saucer with a spoon, on a wooden table.",
        [
            ("What is in the cup?", "Coffee."),
            ("What colour is the saucer?", "Red."),
            ("What lies on the saucer?", "A spoon."),
        ],
    ),
    "skimage/photos/coins.png": (
        "old coins",
        "Four rows of old coins on a dark ground.",
        [("What is shown?", "Old coins."), ("How many rows of coins are there?", "Four.")],
    ),
    "skimage/photos/color.png": (
        "a color wheel",
        "A color wheel on a black ground.",
        [("What is the shape of the coloured part?", "A circle."), ("What colour is the ground?", "Black.")],
    ),
    "skimage/photos/grass.png": ("grass", "Grass from above, in gray.", [("What grows here?", "Grass.")]),
    "skimage/photos/gravel.png": (
        "gravel",
        "Gravel from above, in gray.",
        [("What covers the ground?", "Gravel.")],
    ),
    "skimage/photos/horse.png": (
        "a horse",
        "The black silhouette of a standing horse.",
        [("Which animal is it?", "A horse."), ("What colour is the horse?", "Black.")],
    ),
    "skimage/photos/hubble_deep_field.jpg": (
        "galaxies",
        "Many galaxies in deep space, seen by the Hubble telescope.",
        [("What are the bright spots?", "Galaxies.")],
    ),
    "skimage/photos/moon.png": (
        "the moon",
        "The surface of the moon with craters.",
        [("Which surface is it?", "The moon's.")],
    ),
    "skimage/photos/motorcycle_left.png": (
        "a motorcycle",
        "A red motorcycle stands in a workshop.",
        [("What colour is the motorcycle?", "Red."), ("Which vehicle is it?", "A motorcycle.")],
    ),
    "skimage/photos/retina.jpg": (
        "a retina",
        "A human retina with its blood vessels.",
        [("Which part of the body is it?", "A retina.")],
    ),
    "skimage/photos/rocket.jpg": (
        "a rocket",
        "A rocket stands on its launch pad at dusk.",
        [("What stands on the launch pad?", "A rocket."), ("Is it bright day?", "No, it is dusk.")],
    ),
    "foolbox/imagenet_00_243.jpg": (
        "a brown dog",
        "A brown dog stands on the grass beside a person.",
        [("Which animal is it?", "A dog."), ("What colour is the dog?", "Brown.")],
    ),
    "foolbox/imagenet_01_559.jpg": (
        "folding chairs",
        "Red folding chairs stand in a room.",
        [("What colour are the chairs?", "Red."), ("What stands in the room?", "Folding chairs.")],
    ),
    "foolbox/imagenet_02_438.jpg": (
        "a beaker",
        "A hand pours from a brown bottle into a glass beaker.",
        [("What is the vessel?", "A beaker."), ("What colour is the bottle?", "Brown.")],
    ),
    "foolbox/imagenet_03_990.jpg": (
        "green chestnut fruits",
        "Green spiny chestnut fruits hang on a twig.",
        [("What colour are the fruits?", "Green.")],
    ),
    "foolbox/imagenet_04_949.jpg": (
        "strawberries",
        "Red strawberries lie on a white surface.",
        [("Which fruits are these?", "Strawberries."), ("What colour are they?", "Red.")],
    ),
    "foolbox/imagenet_05_853.jpg": (
        "a thatched house",
        "A white house with a thatched roof behind a lawn.",
        [("What is the roof made of?", "Thatch."), ("What is in front of the house?", "A lawn.")],
    ),
    "foolbox/imagenet_06_609.jpg": (
        "a jeep",
        "An off-road car on a gravel road.",
        [("Which vehicle is it?", "An off-road car.")],
    ),
    "foolbox/imagenet_07_609.jpg": (
        "a blue car",
        "A blue off-road car climbs over rocks.",
        [("What colour is the car?", "Blue."), ("What does it drive on?", "Rocks.")],
    ),
    "foolbox/imagenet_08_915.jpg": (
        "a yurt",
        "Yurts with a wooden deck among tall trees.",
        [("What kind of tent is it?", "A yurt."), ("What stands around it?", "Trees.")],
    ),
    "foolbox/imagenet_09_455.jpg": (
        "a bottle cap",
        "A red bottle cap on a white ground.",
        [("What is it?", "A bottle cap."), ("What colour is it?", "Red.")],
    ),
    "foolbox/imagenet_10_541.jpg": (
        "a drum",
        "A red drum with metal fittings and two sticks on it.",
        [("Which instrument is it?", "A drum."), ("What colour is the drum?", "Red.")],
    ),
    "foolbox/imagenet_11_630.jpg": (
        "a black shoe",
        "A black leather shoe on a white ground.",
        [("What is it?", "A shoe."), ("What colour is it?", "Black.")],
    ),
    "foolbox/imagenet_12_741.jpg": (
        "stained glass windows",
        "Colourful stained glass windows with pointed arches.",
        [("What kind of windows are these?", "Stained glass windows.")],
    ),
    "foolbox/imagenet_13_471.jpg": (
        "a cannon",
        "An old cannon on two large wheels.",
        [("Which weapon is it?", "A cannon."), ("What does it stand on?", "Two wheels.")],
    ),
    "foolbox/imagenet_14_129.jpg": (
        "birds on a wire",
        "Two birds perch on power lines against the sky.",
        [("Where do the birds perch?", "On power lines."), ("How many birds are there?", "Two.")],
    ),
    "foolbox/imagenet_15_99.jpg": (
        "geese",
        "Brown geese stand on the grass.",
        [("Which animals are these?", "Geese."), ("What do they stand on?", "Grass.")],
    ),
    "foolbox/imagenet_16_251.jpg": (
        "a dalmatian",
        "A dalmatian, a white dog with black spots, sniffs at the ground.",
        [("Which animal is it?", "A dog."), ("What colour are its spots?", "Black.")],
    ),
    "foolbox/imagenet_17_22.jpg": (
        "a bald eagle",
        "A bald eagle in flight with its wings spread.",
        [("Which bird is it?", "A bald eagle."), ("What colour is its head?", "White.")],
    ),
    "foolbox/imagenet_18_317.jpg": (
        "a leafhopper",
        "A striped leafhopper on a green leaf.",
        [("What kind of animal is it?", "An insect."), ("What colour is the leaf?", "Green.")],
    ),
    "foolbox/imagenet_19_305.jpg": (
        "a beetle",
        "A dark beetle on sandy ground.",
        [("What kind of animal is it?", "A beetle.")],
    ),
    "sklearn/china.jpg": (
        "a Chinese temple",
        "A Chinese temple with many roofs stands above a lake.",
        [("What kind of building is it?", "A temple."), ("What is behind it?", "A lake.")],
    ),
    "sklearn/flower.jpg": (
        "an orange flower",
        "An orange dahlia flower on a dark ground.",
        [("What is it?", "A flower."), ("What colour is the flower?", "Orange.")],
    ),
}


@dataclass(frozen=True)
class Photograph:
    """One photograph as RGB, with its words."""

    name: str
    caption: str
    questions: Turns
    picture: Image.Image


def read_photographs(cache: Path) -> list[Photograph]:
    """All photographs, in the order of the table. `cache` is the assets' folder."""
    found = []
    for path, (name, caption, questions) in PHOTOGRAPHS.items():
        with Image.open(cache / path) as opened:
            picture = opened.convert("RGB")
        picture.thumbnail((640, 640))
        found.append(Photograph(name, caption, questions, picture))
    return found


def form_paths(synthdog: Path) -> list[Path]:
    """The files of the 50 scanned forms, in the order of their names."""
    return sorted((synthdog / "forms").glob("*.png"))


def vary(picture: Image.Image, rng: random.Random) -> Image.Image:
    """The whole picture again, of another size, maybe mirrored: what is said of it stays true."""
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = rng.choice((160, 224, 300, 400, 560)) / max(picture.size)
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)


def join(pictures: list[Image.Image], down: bool, side: int) -> Image.Image:
    """Pictures cut to squares of `side` pixels, beside each other or one below the other."""
    squares = []
    for picture in pictures:
        edge = min(picture.size)
        left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
        squares.append(picture.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + edge, top + edge)))
    whole = Image.new("RGB", (side, side * len(squares)) if down else (side * len(squares), side))
    for row, square in enumerate(squares):
        whole.paste(square, (0, row * side) if down else (row * side, 0))
    return whole


def form_part(path: Path, rng: random.Random) -> tuple[str, Image.Image]:
    """One part of a scanned form at half size, wide or tall or all of it, and what it is called."""
    with Image.open(path) as opened:
        form = opened.convert("RGB")
    width, height = form.size
    boxes = {
        "A scanned form.": (0, 0, width, height),
        "The upper half of a scanned form.": (0, 0, width, height // 2),
        "The lower half of a scanned form.": (0, height // 2, width, height),
        "A wide strip from the top of a scanned form.": (0, 0, width, height // 4),
        "The left half of a scanned form.": (0, 0, width // 2, height),
        "The upper left corner of a scanned form.": (0, 0, width // 2, height // 2),
    }
    caption = rng.choice(list(boxes))
    part = form.crop(boxes[caption])
    return caption, part.resize((part.width // 2, part.height // 2), Image.Resampling.LANCZOS)
