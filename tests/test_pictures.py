"""PNGs and labelled grids."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from utils import pictures
from utils.pictures import font_for, save_grid, save_images, to_pil


def test_to_pil():
    image = torch.tensor([0.0, 0.5, 1.0, -1.0, 2.0, 100 / 255]).view(1, 2, 3).expand(3, 2, 3) * torch.ones(3, 1, 1)
    assert np.asarray(to_pil(image))[..., 1].tolist() == [[0, 128, 255], [0, 255, 100]]


def test_save_images_replaces_older_ones(tmp_path):
    images = torch.arange(4).view(4, 1, 1, 1).expand(4, 3, 5, 7) / 4
    save_images(images, tmp_path / "new")
    (tmp_path / "new" / "notes.txt").write_text("mine")
    save_images(images[1:3], tmp_path / "new")
    assert sorted(os.listdir(tmp_path / "new")) == ["notes.txt", "sample_000.png", "sample_001.png"]
    first = Image.open(tmp_path / "new" / "sample_000.png")
    assert first.size == (7, 5) and first.getpixel((0, 0)) == (64, 64, 64)


@pytest.mark.parametrize(("height", "width", "shown"), [(128, 128, (128, 128)), (512, 1024, (128, 256))])
def test_grid_has_every_picture_at_its_place(height, width, shown, tmp_path):
    """Cells are found from the lower right corner, past labels whose size depends on the font."""
    tones = {"full": (0.1, 0.2, 0.3), "1.58 bit": (0.6, 0.7, 0.8)}
    rows = {name: torch.tensor(t).view(3, 1, 1, 1).expand(3, 3, height, width) for name, t in tones.items()}
    prompts = ["short", "a prompt with so many words " * 20, ""]
    save_grid(rows, prompts, tmp_path / "deep" / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "deep" / "grid.png").convert("L")).astype(int)
    step_y, step_x = shown[0] + 4, shown[1] + 4
    top, left = grid.shape[0] - 2 * step_y, grid.shape[1] - 3 * step_x
    assert top > 0 and left > 0
    for y, row in enumerate(tones.values()):
        for x, tone in enumerate(row):
            cell = grid[top + y * step_y :, left + x * step_x :][: shown[0], : shown[1]]
            assert cell.shape == shown and abs(cell - round(255 * tone)).max() <= 1
    titles, names = grid[:top, left:], grid[top:, :left]
    assert (titles[:, :step_x] < 128).any() and (titles[:, step_x : 2 * step_x] < 128).any()
    assert (titles[:, 2 * step_x :] == 255).all()  # the empty prompt
    assert (names[:step_y] < 128).any() and (names[step_y:] < 128).any()


def test_a_picture_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    save_images(torch.zeros(2, 3, 5, 7), tmp_path)

    def save(self, file, format):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(ValueError, match="sample_000.png: No space left on device"):
        save_images(torch.ones(1, 3, 5, 7), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["sample_000.png", "sample_001.png"]
    assert Image.open(tmp_path / "sample_000.png").getpixel((0, 0)) == (0, 0, 0)


def test_the_font_has_the_letters_or_is_the_one_that_lacks_least(monkeypatch):
    for text in ("a red star", "süß, naïve, Łódź", "☃ 😀"):  # matplotlib's has them
        font = font_for(text, 20)
        assert {bytes(font.getmask(letter)) for letter in text if not letter.isspace()}.isdisjoint(
            {bytes(font.getmask("\U0010fffd"))}  # a box
        )
    default = font_for("a", 20).path
    has = {default: set(map(ord, "abc")), "/broad": set(map(ord, "abc三つ")), "/narrow": set(map(ord, "三"))}
    monkeypatch.setattr(pictures, "characters", lambda font: has.get(font, set()))
    monkeypatch.setattr(pictures.font_manager, "findSystemFonts", lambda: ["/narrow", "/broad", "/broken"])
    monkeypatch.setattr(pictures.ImageFont, "truetype", lambda font, size: font)
    assert [font_for(text, 20) for text in ("abc", "a 三つ", "三つ星", "q")] == [default, "/broad", "/broad", default]


def test_a_font_file_that_is_none(tmp_path):
    (tmp_path / "font.ttf").write_bytes(b"nothing")
    assert pictures.characters(str(tmp_path / "font.ttf")) == frozenset()
