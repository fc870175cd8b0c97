"""Faults in what commands write, print and draw."""

import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from safetensors.torch import save_file

from headscope import HeadAtlas, models, profile
from headscope.commands import forbid, pipe
from headscope.commands.outputs import Output, check_outputs
from headscope.errors import HeadscopeError
from headscope.models.loading import Loaded
from headscope.models.tokens import Tokens, tokenize
from headscope.training import checkpoint, head_counts
from headscope.views.figures import atlas as atlas_figures
from headscope.views.figures import maps
from headscope.views.links import Head
from headscope.watching.recording import Recording
from headscope.watching.recording.file import KIND
from headscope.watching.texts import record_text
from tests.commands.runner import command
from tests.tiny_atlas import PLAN, documents, few_sentences

TEXT = "Red owl. It sat."
CONLLU = "1\tSit\tsit\tVERB\t_\t_\t0\troot\t_\t_\n\n"


@pytest.fixture
def tiny_model(tiny_decoder: Loaded, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """A random decoder that reads letters, in place of every model."""
    monkeypatch.setattr(models, "load", lambda name, **options: tiny_decoder)
    return tiny_decoder


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that loads a model fails the test: what is wrong is said before the work."""

    def load(name: str, **options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load", load)


def recorded(loaded: Loaded) -> tuple[Recording, Tokens]:
    tokens = tokenize(TEXT, loaded.tokenizer, start_token_id=0)
    return record_text(loaded, tokens), tokens


def refusal(*words: str, stdin: str | None = None) -> str:
    """The message with which a command refuses."""
    done = command(*words, stdin=stdin)
    assert (done.exit_code, done.stdout) == (1, ""), done.output
    return " ".join(done.stderr.split())


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with a user's files, which are there unchanged at the end."""
    files = {"story.txt": TEXT, "bank.conllu": CONLLU, "model/weights.bin": "weights", "model/config.json": "{}"}
    (tmp_path / "model").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "link").symlink_to("story.txt")
    os.link(tmp_path / "story.txt", tmp_path / "hard")
    yield tmp_path
    for name, text in files.items():
        assert (tmp_path / name).read_text() == text
    assert (tmp_path / "link").is_symlink()


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize(
    "words",
    [
        "see --file story.txt --save story.txt",
        "see --file story.txt --save ./link",
        "see --file link --save hard",
        "see --model model --save model/weights.bin",
        "heads --treebank bank.conllu --out bank.conllu",
        "heads --text story.txt bank.conllu --out model/../bank.conllu",
        "heads --model model --again --out model/config.json",
    ],
)
def test_an_output_is_no_input(words: str, force: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert "would overwrite" in refusal(*words.split(), *force)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    "words",
    [
        "see --save new.png --figure new.png --force",
        "see --save new.svg --figure ./model/../new.svg --force",
        "heads --again --out new.png --figure link.png --force",
    ],
)
def test_an_output_is_no_other_output(words: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    Path("link.png").symlink_to("new.png")
    assert "is also --" in refusal(*words.split())
    assert not Path("new.png").exists()


@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
def test_an_output_is_no_standard_stream(stream: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    with path.open("w+") as file:
        monkeypatch.setattr(sys, stream, file)
        with pytest.raises(HeadscopeError, match=r"--save .* is also the "):
            check_outputs([Output("--save", path, KIND)], [], force=True)


def writers(loaded: Loaded, atlas: HeadAtlas) -> dict[str, Callable[[Path, bool], object]]:
    """What saves each kind of file, to a path with `force` or without."""
    recording, tokens = recorded(loaded)
    return {
        "a.headscope": lambda path, force: recording.save(path, force=force),
        "a.parquet": lambda path, force: atlas.save(path, force=force),
        "maps.png": lambda path, force: maps.thumbnails(recording, tokens, path, force=force),
        "map.svg": lambda path, force: maps.head_map(recording, tokens, Head(0, 1), path, force=force),
        "atlas.pdf": lambda path, force: atlas_figures.draw(atlas, path, force=force),
    }


@pytest.mark.parametrize("name", ["a.headscope", "a.parquet", "maps.png", "map.svg", "atlas.pdf"])
def test_saved_files_leave_what_is_not_theirs(
    name: str, tiny_decoder: Loaded, tiny_atlas: HeadAtlas, tmp_path: Path
) -> None:
    write, path = writers(tiny_decoder, tiny_atlas)[name], tmp_path / name
    others: list[Callable[[], object]] = [
        lambda: path.write_text("a diary"),
        lambda: save_file({"weight": torch.ones(3)}, path, {"format": "pt"}),
        lambda: path.write_bytes(b"PAR1" + bytes(9) + b"PAR1"),
    ]
    for make in others:
        make()
        theirs = path.read_bytes()
        with pytest.raises(HeadscopeError, match="the file that is there is not a"):
            write(path, False)
        assert path.read_bytes() == theirs
    write(path, True)
    write(path, False)  # its own kind
    path.write_bytes(b"")  # as mktemp makes it: nothing is lost
    link = tmp_path / f"link{path.suffix}"
    link.symlink_to(path)
    write(link, False)
    assert link.is_symlink()
    assert path.stat().st_size > 100
    assert {file.name for file in tmp_path.iterdir()} == {name, link.name}
    fifo = tmp_path / f"pipe{path.suffix}"
    os.mkfifo(fifo)
    with pytest.raises(HeadscopeError, match="it is a device, a pipe or a socket"):
        write(fifo, True)
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_saved_files_have_the_mode_of_the_umask(
    umask: int, tiny_decoder: Loaded, tiny_atlas: HeadAtlas, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        paths = [tmp_path / name for name in writers(tiny_decoder, tiny_atlas)]
        for path in paths:
            writers(tiny_decoder, tiny_atlas)[path.name](path, False)
        paths.append(checkpoint.save(tmp_path / "runs", 1, {"config": {}}, {"model.a": torch.ones(2)}))
    finally:
        os.umask(before)
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in paths} == {oct(0o666 & ~umask)}
    paths[0].chmod(0o640)
    writers(tiny_decoder, tiny_atlas)[paths[0].name](paths[0], False)
    assert stat.S_IMODE(paths[0].stat().st_mode) == 0o640  # as a file that is overwritten in place


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("see --save /dev/null", "it is a device"),
        ("see --save story.txt", "is not a recording. Choose another name, or overwrite it: --force"),
        ("see --figure picture.png", "is not a .png figure"),
        ("heads --again --out story.txt", "is not an atlas of heads"),
        ("heads --again --out circle", "Too many levels of symbolic links"),
        ("see --save lost", "there is no folder"),
    ],
)
def test_a_command_refuses_such_an_output_before_the_work(
    words: str, reason: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    Path("picture.png").write_bytes(b"\xff\xd8\xff\xe0 a photograph")
    Path("circle").symlink_to("circle")
    Path("lost").symlink_to("nowhere/else")
    assert reason in refusal(*words.split())


def test_a_command_overwrites_with_force(tiny_model: Loaded, tmp_path: Path) -> None:
    path, new = tmp_path / "old.txt", tmp_path / "new"
    path.write_text("a draft")
    new.symlink_to("later.headscope")
    assert command("see", TEXT, "--save", str(path), "--force").exit_code == 0
    assert len(Recording.load(path)) == 2
    assert command("see", TEXT, "--save", str(new)).exit_code == 0  # a link to a name that is still free
    assert len(Recording.load(tmp_path / "later.headscope")) == 2


def test_a_folder_of_others_is_not_used_for_shards(tiny_decoder: Loaded, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(HeadscopeError, match="is for finished shards, and holds other files"):
        profile(tiny_decoder, texts=documents(), relations=few_sentences(), plan=PLAN, shards=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_training_leaves_the_files_of_others(tmp_path: Path) -> None:
    theirs = tmp_path / "step-00000001.safetensors"
    save_file({"a": torch.ones(3)}, theirs)
    done = command("train", "copy", "--out", str(tmp_path), "--steps", "1")
    assert done.exit_code == 1
    assert "a file of another program" in " ".join(done.stderr.split())
    (tmp_path / "one-or-many.md").write_text("# One head or many?\n\nA page of mine.\n")
    with pytest.raises(HeadscopeError, match="is not such a report"):
        head_counts.compare_head_counts(tmp_path, head_counts.QUICK)


def test_forbid_reads_a_file_and_a_pipe(tiny_model: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, link = tmp_path / "text", ("--from", "It", "--to", "owl", "--json")
    path.write_text("An owl. It")
    by_argument = command("forbid", "An owl. It", *link).stdout
    assert json.loads(by_argument)["text"] == "An owl. It"
    assert command("forbid", "--file", str(path), *link).stdout == by_argument
    monkeypatch.setattr(pipe, "is_piped", lambda: True)
    monkeypatch.setattr(forbid, "is_piped", lambda: True)
    assert command("forbid", *link, stdin="An owl. It").stdout == by_argument
    assert command("forbid", "An owl.", "--file", str(path)).exit_code == 2
    other_way = refusal("forbid", "--from", "owl", "--to", "It", stdin="An owl. It")
    assert other_way.endswith("Try: headscope forbid --from It --to owl -")


@pytest.mark.parametrize(
    ("words", "pairs"),
    [
        ("--from It --to owl", "It → owl"),
        ("--from It --to owl --head 1.2", "It → owl"),
        ("--to Red --top 1", "→ Red"),
        ("--from sat --from sat --head 0.1 --top 1", "sat → "),
    ],
)
def test_a_figure_frames_the_links_that_were_named(words: str, pairs: str, tiny_model: Loaded, tmp_path: Path) -> None:
    plain, framed = tmp_path / "plain.svg", tmp_path / "framed.svg"
    head = words.split()[-4:-2] if "--head 0.1" in words else words.split()[-2:] if "--head" in words else []
    assert command("see", TEXT, "--figure", str(plain), *head).exit_code == 0
    assert command("see", TEXT, "--figure", str(framed), *words.split()).exit_code == 0
    frame = f"stroke: {maps._FRAME}"
    assert frame not in plain.read_text()
    marks = framed.read_text().count(frame)
    assert marks == len(json.loads(command("see", TEXT, "--json", *words.split()).stdout)["links"]) * (2 - bool(head))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--by roles", "chooses what a figure shows: give --figure"),
        ("--atlas a.parquet --length 512", "and --length would measure"),
        ("--atlas a.parquet --pieces 1 --worth", "and --worth, --pieces would measure"),
        ("--atlas a.parquet --again --no-worth", "and --no-worth, --again would measure"),
        ("--atlas a.parquet --model smollm2", "and --model would measure"),
    ],
)
def test_an_option_that_changes_nothing_is_refused_also_at_its_default(options: str, message: str) -> None:
    assert message in refusal("heads", *options.split())


@pytest.mark.usefixtures("no_work")
def test_all_shows_every_measure_of_a_head(tiny_atlas: HeadAtlas, tmp_path: Path) -> None:
    path = str(tiny_atlas.save(tmp_path / "a.parquet"))
    few, every = (command("heads", "--atlas", path, "--head", "1.2", *extra).stdout for extra in ([], ["--all"]))
    assert "entropy_share" not in few
    assert "entropy_share" in every


@pytest.mark.parametrize("columns", ["0", "12", "40", "49", "60"])
def test_every_number_is_printed_however_narrow_the_terminal(
    columns: str, tiny_model: Loaded, tiny_atlas: HeadAtlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tiny_atlas.save(tmp_path / "a.parquet"))
    commands = [
        ("see", TEXT, "--from", "It"),
        ("see", TEXT, "--head", "1.2"),
        ("forbid", TEXT, "--from", "sat", "--to", "owl"),
        ("heads", "--atlas", path),
        ("models",),
    ]
    monkeypatch.setenv("COLUMNS", "110")
    wide = [command(*words).stdout for words in commands]
    monkeypatch.setenv("COLUMNS", columns)
    for words, wanted in zip(commands, wide, strict=True):
        done = command(*words)
        assert done.exit_code == 0
        assert not re.search(r"\w…", done.stdout)  # nothing is cut
        numbers = re.findall(r"\d+\.\d+", wanted)
        assert numbers
        assert set(numbers) <= set(re.findall(r"\d+\.\d+", done.stdout))


@pytest.mark.parametrize("text", ["苹果" * 70, "W" * 160, f"她{chr(0x12000)}ok " * 30])
@pytest.mark.parametrize("one_head", [True, False])
def test_a_caption_stays_inside_its_figure_and_keeps_what_can_be_drawn(
    text: str, one_head: bool, tiny_decoder: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(maps, "save_figure", lambda figure, path, force: figures.append(figure) or path)
    recording, _ = recorded(tiny_decoder)
    tokens = replace(recorded(tiny_decoder)[1], text=text)
    if one_head:
        maps.head_map(recording, tokens, Head(0, 1), tmp_path / "a.png", model="M" * 90)
    else:
        maps.thumbnails(recording, tokens, tmp_path / "a.png", model="M" * 90)
    figure = figures[0]
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [shown.get_window_extent(renderer) for shown in figure.texts]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height for box in boxes)
    assert boxes[0].y0 >= boxes[1].y1 - 2  # the title, and below it the caption
    assert "ok" not in text or "ok" in figure.texts[1].get_text()
