"""The toy world: prompts that can be read back, pictures that fit them, a grader that sees both sides."""

import random
from collections import Counter

import pytest
import torch

from utils import scenes

SAMPLES = 100  # a category


@pytest.fixture(scope="module")
def drawn():
    """Random scenes of every category: (scene, prompt, picture)."""
    rng = random.Random(7)
    cases = [(s := scenes.sample_scene(c, rng), scenes.describe(s, rng)) for c in scenes.CATEGORIES * SAMPLES]
    pictures = scenes.render([prompt for _, prompt in cases], range(len(cases)))
    return [(scene, prompt, picture) for (scene, prompt), picture in zip(cases, pictures, strict=True)]


# ----- prompts


def test_the_world_is_large_enough():
    assert len(scenes.SHAPES) >= 8 and len(scenes.COLORS) >= 8
    assert len(scenes.CATEGORIES) == 6


def test_parse_inverts_describe():
    rng = random.Random(1)
    for _ in range(20_000):
        scene = scenes.sample_scene(scenes.pick(rng, scenes.CATEGORIES), rng)
        prompt = scenes.describe(scene, rng)
        assert scenes.parse(prompt) == scene, prompt


@pytest.mark.parametrize(
    ("prompt", "scene"),
    [
        ("a star", scenes.Scene("single_object", (("star", None),))),
        ("A Photo of an ORANGE disc.", scenes.Scene("colors", (("circle", "orange"),))),
        ("there are three plus signs", scenes.Scene("counting", (("cross", None),) * 3)),
        ("draw one moon on dark paper", scenes.Scene("counting", (("moon", None),), None, "dark")),
        (
            "a ring beneath a box against a light backdrop",
            scenes.Scene("position", (("ring", None), ("square", None)), "below", "light"),
        ),
        (
            "a red star as well as a blue hoop",
            scenes.Scene("color_attr", (("star", "red"), ("ring", "blue"))),
        ),
    ],
)
def test_parse_reads_plain_english(prompt, scene):
    assert scenes.parse(prompt) == scene


@pytest.mark.parametrize(
    "prompt",
    ["", "a dog", "a star and", "five stars", "a mauve ring", "a star and a star", "a red star above a blue ring",
     "a red star and a ring", "a star and a ring and a moon", "a star on a plaid background"],
)  # fmt: skip
def test_parse_refuses_other_sentences(prompt):
    assert scenes.parse(prompt) is None


def test_training_and_evaluation_prompts_are_disjoint_unique_and_fixed():
    train, evaluation = scenes.train_prompts(6000), scenes.eval_prompts()
    assert len(set(train)) == 6000 and len(set(evaluation)) == 1200
    assert not set(train) & set(evaluation)
    assert scenes.train_prompts(100) == train[:100] and scenes.eval_prompts(6) == evaluation[:6]
    assert Counter(scenes.parse(p).category for p in evaluation) == dict.fromkeys(scenes.CATEGORIES, 200)
    assert [scenes.parse(p).category for p in train[:6]] == list(scenes.CATEGORIES)


def test_a_prompt_is_an_evaluation_prompt_or_not_whoever_asks():
    rng = random.Random(3)
    drawn = {scenes.sample_prompt(scenes.pick(rng, scenes.CATEGORIES), rng) for _ in range(3000)}
    assert not drawn & set(scenes.eval_prompts())


@pytest.mark.parametrize("n", [0, -1])
def test_no_prompts_are_refused(n):
    with pytest.raises(ValueError, match=str(n)):
        scenes.train_prompts(n)
    with pytest.raises(ValueError, match=str(n)):
        scenes.eval_prompts(n)


def test_more_evaluation_prompts_than_there_are_are_refused():
    with pytest.raises(ValueError, match="1201"):
        scenes.eval_prompts(1201)


def test_beyond_the_different_wordings_training_prompts_come_again():
    many = scenes.train_prompts(12000)
    assert many[:6000] == scenes.train_prompts(6000)
    assert 9000 < len(set(many)) < 12000 and not set(many) & set(scenes.eval_prompts())
    assert Counter(scenes.parse(p).category for p in many) == dict.fromkeys(scenes.CATEGORIES, 2000)


# ----- renderer


def test_render_is_deterministic_and_differs_by_seed():
    prompt = "a red star and a blue ring"
    first, again, other = scenes.render([prompt] * 3, [5, 5, 6])
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (3, 128, 128) and 0 <= first.min() and first.max() <= 1
    alone = scenes.render([prompt], [5])[0]
    assert torch.equal(alone, first)  # whatever else is drawn with it


def test_render_is_anti_aliased():
    """Going around a circle's edge, coverage takes many values between background and body."""
    layout = scenes.layout(scenes.parse("a red circle on a light background"), random.Random(0))
    picture = scenes.rasterize(torch.tensor([layout]))[0]
    chroma = picture.amax(0) - picture.amin(0)
    partial = ((chroma > 0.1) & (chroma < 0.5)).sum().item()
    radius = layout[8] * 0.92
    assert 0.3 * 2 * torch.pi * radius < partial < 3 * 2 * torch.pi * radius


def test_silhouettes_have_the_areas_of_their_formulas():
    """Pixels inside each outline against areas from school geometry; the heart and the moon are summed by hand."""
    axis = (torch.arange(800) + 0.5) / 400 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    area = {shape: (scenes.signed_distance(shape, x, y) < 0).double().mean().item() * 4 for shape in scenes.SHAPES}
    pi = torch.pi
    sine = torch.sin(torch.tensor(pi / 5)).item()
    expected = {
        "circle": pi * 0.92**2,
        "square": 4 * 0.76**2,
        "triangle": 3 * 3**0.5 / 4 * 1.0,  # circumradius 1
        "star": 10 * 0.5 * 1.0 * 0.45 * sine,  # ten triangles with sides 1 and 0.45 around the centre
        "cross": 2 * (4 * 0.92 * 0.32) - 4 * 0.32**2,
        "ring": pi * (0.94**2 - 0.46**2),
        "heart": 2 * 0.78**2 + pi * 0.78**2 / 2,  # square of side 0.78·√2 and two half discs of that diameter
    }
    for shape, value in expected.items():
        assert area[shape] == pytest.approx(value, rel=0.01), shape
    assert 0 < area["moon"] < pi * 0.95**2


def test_render_refuses_other_prompts():
    with pytest.raises(ValueError, match="a dog"):
        scenes.render(["a dog"], [0])


# ----- grader


def test_grader_passes_true_renders(drawn):
    verdicts = scenes.grade(torch.stack([d[2] for d in drawn]), [d[1] for d in drawn])
    assert verdicts.float().mean() >= 0.995


def test_grader_refuses_renders_under_contradicting_captions(drawn):
    """Shift the captions against the pictures and keep the pairs whose scenes contradict each other."""
    rng = random.Random(11)
    pictures, captions = [], []
    for scene, _, picture in drawn:
        other, caption, _ = drawn[int(rng.random() * len(drawn))]
        if contradicts(scene, other):
            pictures.append(picture)
            captions.append(caption)
    assert len(captions) > 300
    assert scenes.grade(torch.stack(pictures), captions).float().mean() <= 0.01


def contradicts(scene: scenes.Scene, caption: scenes.Scene) -> bool:
    """Plain Python, from the two scenes alone: nothing that fits `scene` can fit `caption`."""
    if sorted(shape for shape, _ in scene.things) != sorted(shape for shape, _ in caption.things):
        return True
    if scene.tone and caption.tone and scene.tone != caption.tone:
        return True
    if scene.relation and caption.relation and scene.things[0][0] != scene.things[-1][0]:
        flipped = {"left": "right", "right": "left", "above": "below", "below": "above"}
        same_order = scene.things[0][0] == caption.things[0][0]
        return scene.relation != (caption.relation if same_order else flipped[caption.relation])
    colors = dict(scene.things)
    return any(color and colors.get(shape) not in (None, color) for shape, color in caption.things)


@pytest.mark.parametrize(
    ("drawn_prompt", "caption"),
    [
        ("a star left of a ring", "a star right of a ring"),
        ("a star left of a ring", "a ring left of a star"),
        ("a star above a ring", "a star left of a ring"),
        ("a red star and a blue ring", "a blue star and a red ring"),
        ("three moons", "four moons"),
        ("three moons", "two moons"),
        ("a star and a ring", "a star"),
        ("a star", "a star and a ring"),
        ("a pink heart", "a red heart"),
        ("a heart on dark paper", "a heart on light paper"),
        ("a circle", "a ring"),
        ("a square", "a circle"),
    ],
)
def test_grader_refuses_near_misses(drawn_prompt, caption):
    pictures = scenes.render([drawn_prompt] * 16, range(16))
    assert scenes.grade(pictures, [drawn_prompt] * 16).all()
    assert not scenes.grade(pictures, [caption] * 16).any()


def test_grader_refuses_pictures_of_nothing():
    torch.manual_seed(0)
    blank, noise = torch.full((1, 3, 128, 128), 0.5), torch.rand(1, 3, 128, 128)
    blurred = torch.nn.functional.avg_pool2d(scenes.render(["a red star"], [0]), 31, stride=1, padding=15)
    assert not scenes.grade(torch.cat([blank, noise, blurred]), ["a red star"] * 3).any()


def test_regions_are_the_connected_ones():
    """Against flood fill in plain Python, on random masks and on a spiral, the worst case for joining runs."""
    spiral = torch.zeros(40, 40, dtype=torch.bool)
    for inset in range(0, 18, 2):
        spiral[inset, inset : 40 - inset] = spiral[inset : 40 - inset, 39 - inset] = True
        spiral[39 - inset, inset : 40 - inset] = spiral[inset + 2 : 40 - inset, inset] = True
        spiral[inset + 2, inset : inset + 2] = True
    torch.manual_seed(0)
    for mask in [spiral, *(torch.rand(40, 40) < density for density in (0.2, 0.4, 0.5, 0.7))]:
        todo, expected = {(y, x) for y, x in mask.nonzero().tolist()}, []
        while todo:
            region, edge = set(), [todo.pop()]
            while edge:
                y, x = edge.pop()
                region.add((y, x))
                around = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & todo
                todo -= around
                edge += around
            expected.append(region)
        found = [{(y, x) for y, x in region.nonzero().tolist()} for region in scenes._regions(mask)]
        assert sorted(map(sorted, found)) == sorted(sorted(r) for r in expected if len(r) >= scenes.MIN_AREA)


def test_detections_name_what_the_layout_put_there():
    rng = random.Random(5)
    cases = [scenes.sample_scene("color_attr", rng) for _ in range(24)]
    layouts = [scenes.layout(scene, random.Random(i)) for i, scene in enumerate(cases)]
    for scene, layout, found in zip(
        cases, layouts, scenes.detect(scenes.rasterize(torch.tensor(layouts))), strict=True
    ):
        assert {(thing.shape, thing.color) for thing in found} == set(scene.things)
        centers = {(scenes.SHAPES[int(layout[2 + 7 * i])]): layout[6 + 7 * i : 8 + 7 * i] for i in range(2)}
        for thing in found:
            radius = layout[8]
            assert (
                torch.dist(torch.tensor(thing.center), torch.tensor(centers[thing.shape])) < 0.45 * radius
            )  # the centroid of a moon lies off its centre


def test_things_that_touch_are_told_apart_by_colour():
    layout = scenes.layout(scenes.parse("a yellow star and a red ring on light paper"), random.Random(0))
    layout[6:9], layout[13:16] = [45.0, 64.0, 22.0], [86.0, 64.0, 22.0]
    touching = scenes.rasterize(torch.tensor([layout]))
    assert len(scenes._regions((touching.amax(1) - touching.amin(1))[0] > scenes.MIN_CHROMA)) == 1
    assert scenes.grade(touching, ["a yellow star and a red ring"]).all()
    assert not scenes.grade(touching, ["a red star and a yellow ring"]).any()


def test_grade_refuses_what_it_cannot_judge():
    picture = scenes.render(["a star"], [0])
    with pytest.raises(ValueError, match="a dog"):
        scenes.grade(picture, ["a dog"])
    with pytest.raises(ValueError, match="64"):
        scenes.grade(picture[..., :64, :64], ["a star"])
