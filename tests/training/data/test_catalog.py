"""The data directory: finding sets, the errors for those that cannot be opened, and the prepare command."""

import contextlib
import socket
import threading
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from training.data import catalog
from training.data.__main__ import main
from training.data.digits import Digits
from training.errors import UserError


def fake_set(directory: Path, folder: str) -> Path:
    """Make a folder that counts as a prepared set until it is opened."""
    version = directory / folder
    version.mkdir(parents=True)
    (version / "dataset_info.json").touch()
    return version


def test_data_directory_prefers_the_argument_then_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", "~/here")
    assert catalog.data_directory(Path("~/there")) == tmp_path / "there"
    assert catalog.data_directory(None) == tmp_path / "here"
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert catalog.data_directory(None) == tmp_path / "tensorflow_datasets"


def test_find_takes_the_newest_complete_version(tmp_path):
    fake_set(tmp_path, "a/9.0.0")
    newest = fake_set(tmp_path, "a/10.0.0")
    fake_set(tmp_path, "a/incomplete.ABCDEF_11.0.0")
    (tmp_path / "a/12.0.0").mkdir()
    configured = fake_set(tmp_path, "b/config/1.0.0")
    assert catalog.find("a", tmp_path) == newest
    assert catalog.find("b/config", tmp_path) == configured
    assert catalog.find("b", tmp_path) is None
    assert catalog.find("../" + tmp_path.name + "/a", tmp_path) is None
    assert catalog.prepared_names(tmp_path) == ["a", "b/config"]


def test_unknown_set_lists_what_is_there(tmp_path):
    fake_set(tmp_path, "mine/1.0.0")
    with pytest.raises(UserError, match=r"digits, one prepared in .* \(there: mine\), .*; got 'cifar_10'"):
        catalog.open_set("cifar_10", tmp_path)


def test_set_that_is_not_prepared_names_directory_and_command(tmp_path):
    directory = tmp_path / "my data"
    with pytest.raises(UserError) as caught:
        catalog.open_set("cifar10", directory)
    assert f"{directory} holds nothing" in str(caught.value)
    assert str(caught.value).endswith(f"run: python -m training.data prepare cifar10 --dir '{directory}'")


def test_set_with_configurations_lists_them(tmp_path):
    fake_set(tmp_path, "faces/small/1.0.0")
    fake_set(tmp_path, "faces/large/1.0.0")
    with pytest.raises(UserError, match="choose one of faces/large, faces/small"):
        catalog.open_set("faces", tmp_path)


def test_set_in_another_format_says_so(write_set, examples):
    directory = write_set("tiny", {"train": examples(3)})
    description = directory / "tiny/1.0.0/dataset_info.json"
    description.write_text(description.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(UserError, match="must be in array_record format; .* holds tfrecord"):
        catalog.open_set("tiny", directory)


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_damaged_description_names_folder_and_remedy(write_set, examples, file):
    directory = write_set("tiny", {"train": examples(3)})
    (directory / "tiny/1.0.0" / file).write_text('{"descr')
    message = rf"{directory}/tiny/1.0.0 are damaged .*; remove that folder and run: "
    with pytest.raises(UserError, match=message) as caught:
        catalog.open_set("tiny", directory)
    assert "\n" not in str(caught.value)


def test_folder_without_description_is_neither_used_nor_overwritten(tmp_path):
    (tmp_path / "digits/1.0.0").mkdir(parents=True)
    with pytest.raises(UserError, match="must be complete or absent; .* lacks dataset_info.json; remove that folder"):
        catalog.open_set("digits", tmp_path)


def test_data_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"'digits' could not be prepared in {tmp_path}/file: NotADirectoryError"):
        catalog.open_set("digits", tmp_path / "file")


def test_prepare_command_writes_the_embedded_set_once(tmp_path, capfd):
    assert main(["prepare", "digits", "--dir", str(tmp_path)]) == 0
    line = f"digits is prepared in {tmp_path}/digits/1.0.0: train 1,257, validation 180, test 360 examples\n"
    assert capfd.readouterr() == (line, "")
    written = (tmp_path / "digits/1.0.0/dataset_info.json").stat().st_mtime_ns
    assert main(["prepare", "digits", "--dir", str(tmp_path)]) == 0
    assert (tmp_path / "digits/1.0.0/dataset_info.json").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_set", "got 'no_such_set'; choose one of these, or name the directory that holds it by --dir\n"),
        ("../cifar10", "got '../cifar10'"),
        ("cifar10_corrupted/no_such_config", "must be one of: brightness_1, "),
        ("mnist/no_such_config", "must be one of: none; got 'no_such_config'"),
    ],
)
def test_prepare_command_refuses_unknown_names(tmp_path, capfd, name, message):
    assert main(["prepare", name, "--dir", str(tmp_path)]) == 2
    captured = capfd.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_prepare_command_fails_at_once_without_a_network(tmp_path, capfd, monkeypatch):
    asked = []

    def refuse(address, timeout):
        asked.append(address)
        raise socket.gaierror("no such host")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(tfds.builder_cls("cifar10"), "download_and_prepare", lambda self, **options: None)
    assert main(["prepare", "cifar10", "--dir", str(tmp_path)]) == 2
    assert asked == [("www.cs.toronto.edu", 443)]
    assert "www.cs.toronto.edu:443 did not answer; connect to the network" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_network_check_asks_the_proxy_where_one_is_set(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(catalog, "_answers", lambda host, port, seconds: asked.append((host, port)))
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy.example:3128"})
    monkeypatch.setattr("urllib.request.proxy_bypass", lambda host: False)
    with pytest.raises(UserError, match="proxy.example:3128 did not answer"):
        catalog.prepare("cifar10", tmp_path)
    assert asked == [("proxy.example", 3128)]


def test_a_host_that_never_answers_counts_as_absent(monkeypatch):
    release = threading.Event()

    def hang(address, timeout):
        release.wait(5)
        return contextlib.nullcontext()

    monkeypatch.setattr(socket, "create_connection", hang)
    assert not catalog._answers("host.example", 443, seconds=0.01)
    release.set()


def test_a_host_that_answers_is_present():
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert catalog._answers("127.0.0.1", server.getsockname()[1], seconds=10)


def test_a_set_that_needs_tensorflow_says_so(tmp_path, monkeypatch, capfd):
    def needs_tensorflow(self, **options):
        raise ModuleNotFoundError("No module named 'tensorflow'")

    builder = tfds.builder_cls("mnist")
    monkeypatch.setattr(builder, "download_and_prepare", needs_tensorflow)
    monkeypatch.setattr(catalog, "_answers", lambda host, port, seconds: True)
    assert main(["prepare", "mnist", "--dir", str(tmp_path)]) == 2
    assert "many TFDS sets need TensorFlow once, while they are prepared" in capfd.readouterr().err


def test_interruption_leaves_nothing(tmp_path, monkeypatch, capfd):
    def interrupt(self, split):
        raise KeyboardInterrupt

    monkeypatch.setattr(Digits, "_generate_examples", interrupt)
    assert main(["prepare", "digits", "--dir", str(tmp_path)]) == 130
    assert capfd.readouterr().err == "interrupted: digits is not prepared\n"
    assert list((tmp_path / "digits").iterdir()) == []
