"""The toy world of tiny-flux: scenes of simple shapes, their prompts, a renderer and a grader.

A `Scene` says what a prompt asks for. Four functions turn one thing into another:

    describe: Scene -> prompt      parse: prompt -> Scene
    render:   Scene -> picture     grade: picture, prompt -> does the picture fit?

The grader sees nothing but pixels, so it judges renders and generated pictures alike, and a prompt has a right
answer. The six categories carry the tags and the sense of GenEval (arXiv 2310.11513): what the prompt leaves open
(the colour of "a star") is free, what it says must hold, and nothing else may be in the picture.

A prompt belongs to the evaluation set if its CRC-32 is divisible by 8, to the training set otherwise: the two
never meet, whatever draws the prompts.
"""

import math
import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 128  # pixels a side
MAX_THINGS = 4
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
EVAL_PER_CATEGORY = 200
WORDINGS = 6000  # prompts that are all different; the smallest category has no more than a sixth of it

# Hues lie at least 22 degrees apart: the hue alone tells the colours, under any shading.
COLORS = {
    "red": (0.85, 0.12, 0.12),
    "orange": (0.96, 0.52, 0.05),
    "yellow": (0.95, 0.86, 0.10),
    "green": (0.13, 0.62, 0.20),
    "cyan": (0.10, 0.75, 0.82),
    "blue": (0.13, 0.27, 0.87),
    "purple": (0.52, 0.15, 0.78),
    "pink": (0.97, 0.45, 0.72),
}
TONES = {"dark": 0.30, "grey": 0.56, "light": 0.85}  # background luminance; the grader splits half-way
NOUNS = {  # shape -> (singular, plural) of its names
    "circle": (("circle", "circles"), ("disc", "discs")),
    "square": (("square", "squares"), ("box", "boxes")),
    "triangle": (("triangle", "triangles"), ("pyramid", "pyramids")),
    "star": (("star", "stars"),),
    "cross": (("cross", "crosses"), ("plus sign", "plus signs")),
    "ring": (("ring", "rings"), ("hoop", "hoops")),
    "heart": (("heart", "hearts"),),
    "moon": (("moon", "moons"), ("crescent", "crescents")),
}
SHAPES = tuple(NOUNS)
NUMBERS = {
    1: ("one", "exactly one"),
    2: ("two", "a pair of"),
    3: ("three", "exactly three"),
    4: ("four", "a group of four"),
}
RELATIONS = {
    "left": ("to the left of", "on the left side of", "left of"),
    "right": ("to the right of", "on the right side of", "right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath"),
}
JOINERS = ("and", "with", "together with", "as well as")
LEADS = (
    "", "a photo of", "a picture of", "an image of", "a drawing of", "an illustration of", "a painting of",
    "a sketch of", "a rendering of", "a scene with", "draw", "show me", "please paint", "there is",
)  # fmt: skip
ENDS = ("on a {} background", "against a {} backdrop", "on {} paper", "in front of a {} wall")

Thing = tuple[str, str | None]  # (shape, colour); colour None: any


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for: exactly these things, on a background of this tone.

    `things` holds one to four (shape, colour) pairs. `relation`: things[0] lies left, right, above or below of
    things[1]. None leaves a colour, the relation or the tone open.
    """

    category: str
    things: tuple[Thing, ...]
    relation: str | None = None
    tone: str | None = None


# ---------------------------------------------------------------------------------------------------- prompts


def pick(rng: random.Random, items: Sequence):
    """One of `items`; built on rng.random() alone, whose stream no Python version changes."""
    return items[int(rng.random() * len(items))]


def sample_scene(category: str, rng: random.Random) -> Scene:
    """A random scene of `category`."""
    shape, other = pick(rng, SHAPES), pick(rng, SHAPES)
    while other == shape:
        other = pick(rng, SHAPES)
    color, other_color = pick(rng, list(COLORS)), pick(rng, list(COLORS))
    while other_color == color:
        other_color = pick(rng, list(COLORS))
    relation = pick(rng, list(RELATIONS)) if category == "position" else None
    tone = pick(rng, list(TONES)) if rng.random() < 0.6 else None
    things = {
        "single_object": ((shape, None),),
        "two_object": ((shape, None), (other, None)),
        "counting": ((shape, None),) * (1 + int(rng.random() * MAX_THINGS)),
        "colors": ((shape, color),),
        "position": ((shape, None), (other, None)),
        "color_attr": ((shape, color), (other, other_color)),
    }[category]
    return Scene(category, things, relation, tone)


def describe(scene: Scene, rng: random.Random) -> str:
    """A prompt for `scene` in plain English, its wording and punctuation drawn from `rng`."""
    count = len(scene.things)
    if scene.category == "counting":
        noun = pick(rng, NOUNS[scene.things[0][0]])[count > 1]
        body = f"{pick(rng, NUMBERS[count])} {noun}"
    else:
        names = []
        for shape, color in scene.things:
            name = pick(rng, NOUNS[shape])[0]
            name = f"{color} {name}" if color else name
            names.append(f"{'an' if name[0] in 'aeiou' else 'a'} {name}")
        link = pick(rng, RELATIONS[scene.relation] if scene.relation else JOINERS)
        body = f" {link} ".join(names)
    lead = pick(rng, LEADS)
    if lead == "there is" and scene.category == "counting" and count > 1:
        lead = "there are"
    end = pick(rng, ENDS).format(scene.tone) if scene.tone else ""
    text = " ".join(part for part in (lead, body, end) if part)
    return f"{text[0].upper()}{text[1:]}." if rng.random() < 0.25 else text


_LEAD = re.compile(rf"^(?:{'|'.join(filter(None, LEADS))}|there are) ")
_END = re.compile(f" (?:{'|'.join(ENDS)})$".replace("{}", f"({'|'.join(TONES)})"))
_SHAPE_OF = {name: shape for shape, names in NOUNS.items() for forms in names for name in forms}
_COUNT_OF = {word: count for count, words in NUMBERS.items() for word in words}
_COUNTED = re.compile(rf"^({'|'.join(_COUNT_OF)}) ({'|'.join(_SHAPE_OF)})$")
_THING = re.compile(
    rf"^an? (?:({'|'.join(COLORS)}) )?({'|'.join(names[0] for forms in NOUNS.values() for names in forms)})$"
)


def _parse_things(body: str) -> tuple[Thing, ...] | None:
    things = []
    for name in re.split(f" (?:{'|'.join(JOINERS)}) ", body):
        match = _THING.match(name)
        if not match:
            return None
        things.append((_SHAPE_OF[match[2]], match[1]))
    return tuple(things)


def parse(prompt: str) -> Scene | None:
    """The scene that `prompt` asks for, or None where it is no sentence of this world."""
    text = " ".join(prompt.lower().split()).rstrip(".")
    text = _LEAD.sub("", text, count=1)
    end = _END.search(text)
    tone = next(filter(None, end.groups())) if end else None
    body = text[: end.start()] if end else text

    counted = _COUNTED.match(body)
    if counted:
        return Scene("counting", ((_SHAPE_OF[counted[2]], None),) * _COUNT_OF[counted[1]], None, tone)
    relation = None
    for name, phrases in RELATIONS.items():
        for phrase in phrases:
            if f" {phrase} " in body and relation is None:
                relation, body = name, body.replace(f" {phrase} ", " and ", 1)
    things = _parse_things(body)
    if things is None:
        return None
    shapes, colors = {shape for shape, _ in things}, {color for _, color in things}
    if len(things) == 1 and relation is None:
        return Scene("colors" if things[0][1] else "single_object", things, None, tone)
    if len(things) != 2 or len(shapes) != 2:
        return None
    if colors == {None}:
        return Scene("position" if relation else "two_object", things, relation, tone)
    if relation is None and None not in colors and len(colors) == 2:
        return Scene("color_attr", things, None, tone)
    return None


def held_out(prompt: str) -> bool:
    """True for the prompts of the evaluation set."""
    return zlib.crc32(prompt.encode()) % 8 == 0


def sample_prompt(category: str, rng: random.Random, evaluation: bool = False) -> str:
    """A random prompt of `category` from the training set, or from the evaluation set."""
    while True:
        prompt = describe(sample_scene(category, rng), rng)
        if held_out(prompt) == evaluation:
            return prompt


def _prompts(n: int, evaluation: bool) -> list[str]:
    """`n` prompts, the categories taking turns, the first WORDINGS of them different."""
    rng, prompts, seen = random.Random(1 if evaluation else 0), [], set()
    while len(prompts) < n:
        category = CATEGORIES[len(prompts) % len(CATEGORIES)]
        prompt = sample_prompt(category, rng, evaluation)
        while prompt in seen and len(prompts) < WORDINGS:
            prompt = sample_prompt(category, rng, evaluation)
        seen.add(prompt)
        prompts.append(prompt)
    return prompts


@lru_cache(maxsize=1)
def _all_eval_prompts() -> tuple[str, ...]:
    return tuple(_prompts(EVAL_PER_CATEGORY * len(CATEGORIES), evaluation=True))


def train_prompts(n: int) -> list[str]:
    """The first `n` training prompts, in a fixed order, the categories taking turns.

    The first WORDINGS are all different; among later ones a wording may come again, to be drawn from other noise.
    Raises ValueError if n is not positive.
    """
    if n < 1:
        raise ValueError(f"train_prompts: n must be at least 1, got {n}")
    return _prompts(n, evaluation=False)


def eval_prompts(n: int = EVAL_PER_CATEGORY * len(CATEGORIES)) -> list[str]:
    """The first `n` of the 1,200 fixed evaluation prompts, the categories taking turns.

    Raises ValueError if n is not between 1 and 1,200.
    """
    if not 1 <= n <= len(_all_eval_prompts()):
        raise ValueError(f"eval_prompts: n must lie between 1 and {len(_all_eval_prompts())}, got {n}")
    return list(_all_eval_prompts()[:n])


# --------------------------------------------------------------------------------------------------- renderer


def signed_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to the outline of `shape` (negative inside), for shapes that fill the unit circle; y points down.

    `x`, `y` and the result have one shape, in units of the circumscribed radius. Near a corner, outside, it is a
    lower bound of the distance, which is all that anti-aliasing needs.
    """

    def box(half_width: float, half_height: float) -> Tensor:
        return torch.maximum(x.abs() - half_width, y.abs() - half_height)

    def disc(cx: float, cy: float, radius: float) -> Tensor:
        return torch.hypot(x - cx, y - cy) - radius

    if shape == "circle":
        return disc(0.0, 0.0, 0.92)
    if shape == "square":
        return box(0.76, 0.76)
    if shape == "triangle":  # equilateral, apex up: three half-planes
        sides = (math.sqrt(3) * x.abs() - y) / 2 - 0.5
        return torch.maximum(sides, y - 0.5)
    if shape == "star":  # fold the plane onto one of ten sectors, then one edge from tip (1, 0) to the inner corner
        sector = math.pi / 5
        angle = torch.atan2(x, -y)
        angle = (angle - 2 * sector * torch.round(angle / (2 * sector))).abs()
        radius = torch.hypot(x, y)
        px, py = radius * torch.cos(angle), radius * torch.sin(angle)
        inner = 0.45
        ex, ey = inner * math.cos(sector) - 1, inner * math.sin(sector)
        return (ey * (px - 1) - ex * py) / math.hypot(ex, ey)
    if shape == "cross":
        return torch.minimum(box(0.92, 0.32), box(0.32, 0.92))
    if shape == "ring":
        return (torch.hypot(x, y) - 0.70).abs() - 0.24
    if shape == "heart":  # a square on its corner with a half disc on either upper side
        side = 0.78
        lobe = torch.hypot(x.abs() - side / 2, y - 0.08 + side / 2) - side / math.sqrt(2)
        corner = (x.abs() + (y - 0.08).abs() - side) / math.sqrt(2)
        return torch.minimum(lobe, corner)
    if shape == "moon":
        return torch.maximum(disc(-0.05, 0.0, 0.95), -disc(0.42, -0.1, 0.72))
    raise ValueError(f"unknown shape {shape!r}, expected one of {', '.join(SHAPES)}")


def layout(scene: Scene, rng: random.Random) -> list[float]:
    """Where and how `scene` is drawn: background tone and gradient (2 numbers), then (shape index, r, g, b, x, y,
    radius) for each of MAX_THINGS slots, in pixels; an empty slot has shape index -1."""
    count = len(scene.things)
    palette = list(COLORS)
    shared = pick(rng, palette)  # things of one kind share a colour, others draw their own
    colors = [color or (shared if scene.category == "counting" else pick(rng, palette)) for _, color in scene.things]
    tone = TONES[scene.tone or pick(rng, list(TONES))] + 0.06 * (rng.random() - 0.5)
    smallest, largest = {1: (21, 32), 2: (18, 25), 3: (16, 21), 4: (15, 19)}[count]
    radii = [smallest + (largest - smallest) * rng.random() for _ in scene.things]
    places: list[tuple[float, float]] = []
    while True:
        places = []
        for radius in radii:
            margin = radius + 4
            places.append(tuple(margin + (SIZE - 2 * margin) * rng.random() for _ in range(2)))
        apart = all(math.dist(places[i], places[j]) >= radii[i] + radii[j] + 5 for i in range(count) for j in range(i))
        if apart and (scene.relation is None or _related(scene.relation, places[0], places[1], slope=1.6)):
            break
    values = [tone, 2 * math.pi * rng.random()]
    for (shape, _), color, radius, (x, y) in zip(scene.things, colors, radii, places, strict=True):
        shade = 0.94 + 0.10 * rng.random()
        values += [float(SHAPES.index(shape)), *(min(1.0, shade * c) for c in COLORS[color]), x, y, radius]
    return values + [-1.0] * (7 * (MAX_THINGS - count))


def _related(relation: str, first: Sequence[float], second: Sequence[float], slope: float = 1.0) -> bool:
    """Does `first` lie `relation` of `second`, at least `slope` times as far along that axis as across it?"""
    dx, dy = first[0] - second[0], first[1] - second[1]
    along, across = {"left": (-dx, dy), "right": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return along > 0 and along >= slope * abs(across)


def rasterize(layouts: Tensor) -> Tensor:
    """Draw `layouts` [B, 2 + 7·MAX_THINGS] (see `layout`) into pictures [B, 3, SIZE, SIZE], values in 0…1.

    Anti-aliased by pixel coverage from the signed distance; lit from the upper left, with a soft grey shadow.
    """
    device, batch = layouts.device, len(layouts)
    axis = torch.arange(SIZE, device=device, dtype=torch.float32) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    unit_x, unit_y = 2 * x / SIZE - 1, 2 * y / SIZE - 1
    tone, angle = layouts[:, 0].view(-1, 1, 1), layouts[:, 1].view(-1, 1, 1)
    background = tone * (1 + 0.05 * (unit_x * torch.cos(angle) + unit_y * torch.sin(angle)))
    image = background.unsqueeze(1).repeat(1, 3, 1, 1)

    slots = layouts[:, 2:].reshape(batch, MAX_THINGS, 7)
    for slot in range(MAX_THINGS):
        for index, shape in enumerate(SHAPES):
            rows = (slots[:, slot, 0] == index).nonzero().squeeze(1)
            if not len(rows):
                continue
            color = slots[rows, slot, 1:4].view(-1, 3, 1, 1)
            cx, cy, radius = slots[rows, slot, 4:7].T.reshape(3, -1, 1, 1)
            u, v = (x - cx) / radius, (y - cy) / radius
            offset = 2.5 / radius
            shadow = torch.sigmoid(-signed_distance(shape, u - offset, v - offset) * radius / 1.5)
            coverage = (0.5 - signed_distance(shape, u, v) * radius).clamp(0, 1).unsqueeze(1)
            light = 1 - 0.14 * (u + v).clamp(-1.4, 1.4).unsqueeze(1)
            gloss = 0.16 * torch.exp(-((u + 0.35) ** 2 + (v + 0.35) ** 2) / 0.12).unsqueeze(1)
            body = (color * light + gloss).clamp(0, 1)
            under = image[rows] * (1 - 0.35 * shadow.unsqueeze(1))
            image[rows] = under + coverage * (body - under)
    return image.clamp(0, 1)


def render(prompts: Sequence[str], seeds: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Pictures [B, 3, SIZE, SIZE] in 0…1 that fit `prompts`; the same prompt and seed give the same picture.

    Raises ValueError for a prompt that is no scene.
    """
    layouts = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        scene = parse(prompt)
        if scene is None:
            raise ValueError(f"not a scene of this world: {prompt!r}")
        layouts.append(layout(scene, random.Random(seed)))
    return rasterize(torch.tensor(layouts, device=device))


# ----------------------------------------------------------------------------------------------------- grader

MIN_AREA = 16  # smaller specks, in pixels, are not things
MIN_CHROMA = 0.22  # background and shadow are grey
MIN_OVERLAP = 0.70  # intersection over union with the silhouette; true renders reach 0.85 and more
TEMPLATE = 32


@dataclass(frozen=True)
class Detection:
    """A thing seen in a picture: shape None where no silhouette fits; centre (x, y) in pixels."""

    shape: str | None
    color: str
    center: tuple[float, float]


def _box_normalized(mask: Tensor) -> tuple[Tensor, float]:
    """Crop `mask` [H, W] to its bounding box and resize to [TEMPLATE, TEMPLATE]; also width over height of the box."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    top, bottom, left, right = rows[0].item(), rows[-1].item() + 1, columns[0].item(), columns[-1].item() + 1
    crop = mask[None, None, top:bottom, left:right].float()
    resized = F.interpolate(crop, (TEMPLATE, TEMPLATE), mode="bilinear", antialias=True)
    return resized[0, 0], (right - left) / (bottom - top)


@lru_cache(maxsize=1)
def _templates() -> tuple[Tensor, list[float]]:
    """Silhouettes [len(SHAPES), TEMPLATE, TEMPLATE] and their aspect ratios."""
    axis = torch.linspace(-1.1, 1.1, 256)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    masks, aspects = zip(*(_box_normalized(signed_distance(shape, x, y) < 0) for shape in SHAPES), strict=True)
    return torch.stack(masks), list(aspects)


def _hue(rgb: Tensor) -> Tensor:
    """Hue in radians of `rgb` [..., 3], as the angle in the plane orthogonal to grey."""
    r, g, b = rgb.unbind(-1)
    return torch.atan2(math.sqrt(3) * (g - b), 2 * r - g - b)


def _nearest_color(rgb: Tensor) -> Tensor:
    """Index into COLORS of the colour nearest in hue to `rgb` [..., 3]."""
    hues = _hue(torch.tensor(list(COLORS.values()), device=rgb.device))
    return torch.cos(_hue(rgb).unsqueeze(-1) - hues).argmax(-1)


def _regions(mask: Tensor) -> list[Tensor]:
    """The 8-connected regions of `mask` [H, W] that have at least MIN_AREA pixels, each as a mask [H, W].

    Runs of pixels in a row are joined with the runs they touch in the row above.
    """
    edges = F.pad(mask.byte(), (1, 1)).diff(dim=1)
    rows, starts = (edges == 1).nonzero().T.tolist()
    ends = (edges == 255).nonzero()[:, 1].tolist()  # one behind the last pixel; 0 - 1 is 255 in bytes
    parent = list(range(len(rows)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = run = parent[parent[run]]
        return run

    above = 0  # the first run that can still touch the present one
    for run, row in enumerate(rows):
        while rows[above] < row - 1 or (rows[above] == row - 1 and ends[above] < starts[run]):
            above += 1
        other = above
        while rows[other] == row - 1 and starts[other] <= ends[run]:
            parent[root(other)] = root(run)
            other += 1

    members: dict[int, list[int]] = {}
    for run in range(len(rows)):
        members.setdefault(root(run), []).append(run)
    regions = []
    for runs in members.values():
        if sum(ends[run] - starts[run] for run in runs) >= MIN_AREA:
            region = torch.zeros_like(mask)
            for run in runs:
                region[rows[run], starts[run] : ends[run]] = True
            regions.append(region)
    return regions


def _recognize(image: Tensor, region: Tensor) -> Detection:
    """What the pixels of `image` [3, H, W] in `region` [H, W] show."""
    templates, aspects = _templates()
    silhouette, aspect = _box_normalized(region)
    shared = torch.minimum(templates, silhouette).sum((1, 2))
    overlap = shared / torch.maximum(templates, silhouette).sum((1, 2))
    best = overlap.argmax().item()
    fitting = overlap[best] >= MIN_OVERLAP and abs(math.log(aspect / aspects[best])) < 0.3
    color = list(COLORS)[_nearest_color(image[:, region].mean(1)).item()]
    y, x = region.nonzero().float().mean(0).tolist()
    return Detection(SHAPES[best] if fitting else None, color, (x, y))


def detect(images: Tensor) -> list[list[Detection]]:
    """The things seen in each of `images` [B, 3, SIZE, SIZE] with values in 0…1.

    A coloured region is a thing; one with no known silhouette is taken apart by colour, for things that touch.
    """
    images = images.float().cpu()
    masks = (images.amax(1) - images.amin(1)) > MIN_CHROMA
    found = []
    for image, mask in zip(images, masks, strict=True):
        things = []
        for region in _regions(mask):
            thing = _recognize(image, region)
            if thing.shape is None:
                colors = _nearest_color(image.movedim(0, -1))
                parts = [part for color in colors[region].unique() for part in _regions(region & (colors == color))]
                things += [_recognize(image, part) for part in parts]
            else:
                things.append(thing)
        found.append(things)
    return found


def fits(scene: Scene, things: Sequence[Detection], tone: float) -> bool:
    """Do the detected `things`, on a background of luminance `tone`, make `scene` and nothing more?"""
    if len(things) != len(scene.things):
        return False
    if scene.tone and min(TONES, key=lambda name: abs(TONES[name] - tone)) != scene.tone:
        return False
    rest = list(things)
    matched = []
    for shape, color in scene.things:
        match = next((t for t in rest if t.shape == shape and color in (None, t.color)), None)
        if match is None:
            return False
        rest.remove(match)
        matched.append(match)
    return scene.relation is None or _related(scene.relation, matched[0].center, matched[1].center)


def grade(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """For each of `images` [B, 3, SIZE, SIZE] in 0…1: does it fit its prompt? A bool tensor [B] on the CPU.

    Raises ValueError for a prompt that is no scene, or for pictures of another size.
    """
    if images.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(f"grade: expected pictures [B, 3, {SIZE}, {SIZE}], got {list(images.shape)}")
    verdicts = []
    tones = images.float().mean(1).flatten(1).median(1).values.tolist()
    for prompt, things, tone in zip(prompts, detect(images), tones, strict=True):
        scene = parse(prompt)
        if scene is None:
            raise ValueError(f"not a scene of this world: {prompt!r}")
        verdicts.append(fits(scene, things, tone))
    return torch.tensor(verdicts)
