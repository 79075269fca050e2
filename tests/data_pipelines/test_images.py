"""Image files by name out of directories, archives and shards."""

import io
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_pipelines.images import Images, open_images

FILES = {f"{folder}{number}.jpg": os.urandom(100 + number) for folder in ("", "b/") for number in range(20)}


def _tar(path: Path, names: list[str], prefix: str = "") -> None:
    with tarfile.open(path, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(prefix + name)
            member.size = len(FILES[name])
            archive.addfile(member, io.BytesIO(FILES[name]))


@pytest.fixture(params=["directory", "tar", "tar of .", "tar of a folder", "shards", "shards and files"])
def images(request: pytest.FixtureRequest, tmp_path: Path) -> Images:
    names = sorted(FILES)
    root = tmp_path / "images"
    root.mkdir()
    match request.param:
        case "tar":
            _tar(root := tmp_path / "images.tar", names)
        case "tar of .":
            _tar(root := tmp_path / "images.tar", names, "./")
        case "tar of a folder":
            _tar(root := tmp_path / "images.tar", names, "train2017/")
        case "shards":
            _tar(root / "0.tar", names[::2], "one/")
            _tar(root / "1.tar", names[1::2])
        case kind:
            loose = names if kind == "directory" else names[::3]
            for name in loose:
                (root / name).parent.mkdir(exist_ok=True)
                (root / name).write_bytes(FILES[name])
            if kind != "directory":
                _tar(root / "rest.tar", [name for name in names if name not in loose])
    return open_images(root)


def test_every_image_is_read_by_its_name(images: Images) -> None:
    assert {name: images.read(name) for name in FILES} == FILES
    assert images.read("./b/../b/3.jpg") == FILES["b/3.jpg"]


def test_keys_are_unique(images: Images) -> None:
    assert len({images.key(name) for name in FILES}) == len(FILES)
    assert images.key("b/3.jpg") == images.key("./b//3.jpg")


def test_threads_and_unpickled_copies_read_the_same(images: Images) -> None:
    names = sorted(FILES) * 10
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(pickle.loads(pickle.dumps(images)).read, names)) == [
            FILES[name] for name in names
        ]


def test_a_missing_image_is_named_with_its_place(images: Images, tmp_path: Path) -> None:
    for name in ("c/1.jpg", "1.jpg/x", "b/3.jpg" * 30, "bb", "zz"):
        with pytest.raises(OSError, match=name[:20]) as error:
            images.read(name)
        assert len(name) > 200 or (
            isinstance(error.value, FileNotFoundError) and str(tmp_path) in str(error.value)
        )
        images.key(name)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "b/../../secret", "..", "", "a\0b"])
def test_no_name_leads_out_of_the_directory(images: Images, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("no")
    with pytest.raises(ValueError, match="image"):
        images.read(name)
    with pytest.raises(ValueError, match="image"):
        images.key(name)


def test_an_absolute_name_inside_of_the_directory_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "real/b").mkdir(parents=True)
    (tmp_path / "real/b/3.jpg").write_bytes(b"3")
    (tmp_path / "link").symlink_to("real")
    images = open_images(tmp_path / "link")
    for folder in ("link", "real", "real/b/.."):
        assert images.read(f"{tmp_path}/{folder}/b/3.jpg") == b"3"
        assert images.key(f"{tmp_path}/{folder}/b/3.jpg") == images.key("b/3.jpg")
    (tmp_path / "realistic").mkdir()
    for outside in ("realistic/3.jpg", "real/../3.jpg"):
        with pytest.raises(ValueError, match=r"lies outside of the images' directory .*; give names"):
            images.read(f"{tmp_path}/{outside}")


@pytest.mark.parametrize("name", ["folder", "pipe", ".", "to_pipe"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to_pipe").symlink_to("pipe")
    with pytest.raises(ValueError, match=rf"the image {name} in .* is a directory or no regular file"):
        open_images(tmp_path).read(name)


def test_a_name_that_the_system_refuses_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for name, told in (
        ("x" * 5000, r"image x{200}… in .*: File name too long"),
        ("loop", "image loop in .*: "),
    ):
        with pytest.raises(OSError, match=f"^cannot read the {told}") as error:
            open_images(tmp_path).read(name)
        assert "Errno" not in str(error.value)


def test_a_file_has_one_key_whatever_leads_to_it(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/1.jpg").touch()
    (tmp_path / "folder").symlink_to("real")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/2.jpg").symlink_to("../real/1.jpg")
    _tar(tmp_path / "a.tar", ["1.jpg"])
    (tmp_path / "b.tar").symlink_to("a.tar")

    real = open_images(tmp_path / "real").key("1.jpg")
    assert real == os.path.realpath(tmp_path / "real/1.jpg")
    assert open_images(tmp_path).key("folder/1.jpg") == real
    assert open_images(tmp_path / "folder").key("1.jpg") == real
    assert open_images(tmp_path / "links").key("2.jpg") == real
    assert open_images(tmp_path / "a.tar").key("1.jpg") != real


def test_what_is_no_place_of_images_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.*neither a directory nor a \.tar"):
        open_images(tmp_path / "nowhere")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("1.jpg"))
    for content in (b"no tar at all" * 100, (tmp_path / "a.tar.gz").read_bytes(), b""):
        (tmp_path / "x.tar").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.tar is no plain tar archive"):
            open_images(tmp_path / "x.tar")


def test_an_archive_cut_short_after_it_was_opened_gives_no_half_image(tmp_path: Path) -> None:
    _tar(tmp_path / "a.tar", ["1.jpg", "2.jpg"])
    images = open_images(tmp_path / "a.tar")
    os.truncate(tmp_path / "a.tar", 1600)
    assert images.read("1.jpg") == FILES["1.jpg"]
    with pytest.raises(OSError, match=r"a\.tar ends inside of 2\.jpg"):
        images.read("2.jpg")
