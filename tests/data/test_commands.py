"""An address runs a command only where the user typed it or allowed it, and no other address ever reaches a shell."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from caduceus.config import Config, load_config, save_config
from caduceus.config.load import ALLOWED
from caduceus.data import build_loader, build_validation
from caduceus.data.remote import RemoteError, read_chunks
from caduceus.errors import UserError
from tests.data.test_stream import write_tar


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What a command of these tests makes, so that it shows that it ran."""
    return tmp_path / "ran"


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "a.tar", {"a.seq": "ACGT" * 64})


@pytest.fixture
def load(tmp_path: Path, shards: Path) -> Callable[..., Config]:
    """A configuration from a YAML file with these keys of `data`, and overrides."""

    def make(data: dict, *overrides: str) -> Config:
        file = tmp_path / "pretrain" / "run.yaml"
        file.parent.mkdir(exist_ok=True)
        values = {"path": str(shards), "seq_len": 64, "workers": 0, "cache_dir": str(tmp_path / "cache")}
        file.write_text(yaml.safe_dump({"data": {**values, **data}, "train": {"global_batch": 4, "micro_batch": 4}}))
        return load_config(file, overrides)

    return make


def open_all(config: Config) -> None:
    next(iter(build_loader(config)))
    if config.data.valid_path or config.data.mode == "shards":
        build_validation(config)


@pytest.mark.parametrize(
    "kind", ["directory", "list", "stream", "stream list", "braces", "joined", "valid_path", "chain"]
)
def test_a_file_runs_no_command(load: Callable[..., Config], mark: Path, shards: Path, tar: Path, kind: str) -> None:
    command = f"pipe:touch {mark}; cat {shards}/{{}}"
    streamed = f"pipe:touch {mark}; cat {tar}"
    data = {
        "directory": {"path": command},
        "list": {"path": [{"path": str(shards), "weight": 1}, {"path": command, "weight": 1}]},
        "stream": {"path": streamed, "mode": "stream"},
        "stream list": {"path": [str(tar), streamed], "mode": "stream"},
        "braces": {"path": f"{{{tar},p}}{{ipe:touch {mark},}}", "mode": "stream"},
        "joined": {"path": f"{tar}::{streamed}", "mode": "stream"},
        "valid_path": {"path": str(tar), "valid_path": streamed, "mode": "stream"},
        "chain": {"path": f"reference::file://{tar}"},
    }[kind]
    with pytest.raises(
        UserError, match=r"^data\.(valid_)?path: '.*' runs a command .*data\.allow_commands=true"
    ) as error:
        open_all(load(data))
    assert "\n" not in str(error.value) and not mark.exists()


@pytest.mark.moderate
def test_what_the_command_line_or_the_key_allows_runs_and_is_shown(
    load: Callable[..., Config], mark: Path, shards: Path, tar: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    whole = f"touch {mark}; cat {shards}/{{}}"
    streamed = f"touch {mark}; cat {tar}"
    for command, config in (
        (whole, load({"path": f"pipe:{whole}", "allow_commands": True})),
        (whole, load({"path": f"pipe:{whole}"}, "data.allow_commands=true")),
        (whole, load({}, f"data.path=pipe:{whole}")),
        (streamed, load({"mode": "stream", "path": f"pipe:{streamed}", "allow_commands": True})),
        (streamed, load({"mode": "stream"}, f"data.path=pipe:{streamed}", f"data.valid_path={tar}")),
        (streamed, load({"mode": "stream", "path": str(tar)}, f"data.valid_path=pipe:{streamed}")),
    ):
        caplog.clear()
        open_all(config)
        assert f"data: runs the command: {command}" in caplog.text
        assert mark.exists()
        mark.unlink()
        save_config(config, tmp_path / "resolved.yaml")  # what a run is resumed from
        assert load_config(tmp_path / "resolved.yaml").data.allow_commands


@pytest.mark.moderate
def test_a_run_remembers_what_was_allowed_and_its_configuration_does_not_hand_it_on(
    load: Callable[..., Config], mark: Path, shards: Path, tmp_path: Path
) -> None:
    whole = f"pipe:touch {mark}; cat {shards}/{{}}"
    run, taken = tmp_path / "run" / "config.yaml", tmp_path / "mine" / "config.yaml"
    taken.parent.mkdir()
    for asked in (load({}, f"data.path={whole}"), load({"path": whole}, "data.allow_commands=true")):
        run.parent.mkdir(exist_ok=True)
        save_config(asked, run)
        assert load_config(run) == asked  # as a resume or a job of the run loads it
        open_all(load_config(run, ["train.lr=1e-3"]))
        assert mark.exists()
        mark.unlink()
        shutil.copy(run, taken)
        with pytest.raises(UserError, match="runs a command"):
            open_all(load_config(taken))
        shutil.rmtree(run.parent)
    assert not mark.exists()


@pytest.mark.moderate
@pytest.mark.parametrize("change", ["another command", "another user", "damaged"])
def test_what_was_allowed_is_for_these_commands_and_this_user(
    load: Callable[..., Config], mark: Path, shards: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "config.yaml"
    save_config(load({}, f"data.path=pipe:cat {shards}/{{}}"), run)
    if change == "another command":
        run.write_text(run.read_text().replace("pipe:cat", f"pipe:touch {mark}; cat"))
    elif change == "another user":
        monkeypatch.setattr("os.getuid", lambda: 12345)
    else:
        (tmp_path / ALLOWED).write_text("[")
    with pytest.raises(UserError, match="runs a command"):
        open_all(load_config(run))
    assert not mark.exists()
    open_all(load_config(run, ["data.allow_commands=true"]))  # as the line advises


@pytest.mark.moderate
def test_what_was_typed_allows_no_command_of_the_file(load: Callable[..., Config], mark: Path, tar: Path) -> None:
    for hidden in (f"pipe:touch {mark}", f"p{{ipe:touch {mark},}}", f"{tar}::pipe:touch {mark}"):
        config = load({"mode": "stream", "valid_path": hidden}, f"data.path=pipe:cat {tar}")
        with pytest.raises(UserError, match=r"data\.path: .* runs a command"):
            open_all(config)
    assert not mark.exists()
    both = (f"data.path=pipe:cat {tar}", f"data.valid_path=pipe:touch {mark}; cat {tar}")
    open_all(load({"mode": "stream", "valid_path": "pipe:false"}, *both))  # which the line advises
    assert mark.exists()


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:9/a'; touch {mark}; '.tar", "s3://b/$(touch {mark}).tar", "/none; touch {mark}"]
)
def test_no_other_address_reaches_a_shell(configure: Callable[..., Config], mark: Path, address: str) -> None:
    address = address.format(mark=mark)
    with pytest.raises((RemoteError, UserError)):
        list(read_chunks(address))
    with pytest.raises(UserError):
        next(iter(build_loader(configure(mode="stream", path=[address]))))
    assert not mark.exists()


def test_yaml_makes_no_objects(tmp_path: Path, mark: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"data:\n  path: !!python/object/apply:os.system ['touch {mark}']\n")
    with pytest.raises(UserError, match=r"run\.yaml: not readable as YAML"):
        load_config(file)
    assert not mark.exists()
