"""The training loop: what must be identical is compared bit for bit, on real shards."""

import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from caduceus.config import Config, save_config
from caduceus.errors import UserError
from caduceus.run.directory import RunDirectory
from caduceus.train.stopping import EXIT_REQUEUE
from caduceus.train.trainer import train
from tests import preloaded
from tests.conftest import shard, write_random_fasta
from tests.train.conftest import SmallRun, children_of, command_of, consumed_samples, numbers


def losses(config: Config) -> list[float]:
    return [row["loss"] for row in numbers(config.run.dir) if "loss" in row]


@pytest.mark.moderate
def test_two_runs_with_one_seed_have_identical_metrics(small_run: SmallRun) -> None:
    first, second = small_run.config("first"), small_run.config("second", data={"workers": 2})
    assert train(first) == train(second) == 0
    rows = numbers(first.run.dir)
    assert rows == numbers(second.run.dir)
    assert [row["samples"] for row in rows if "loss" in row] == list(range(8, 81, 8))
    assert [row["step"] for row in rows if "valid_loss" in row] == [4, 8, 10]
    assert "valid_loss/small" in rows[-1]
    third = small_run.config("third", train={"seed": 1})
    train(third)
    assert losses(third) != losses(first)


@pytest.mark.moderate
def test_micro_batches_do_not_change_the_run(small_run: SmallRun) -> None:
    whole, pieces = (
        small_run.config(str(size), train={"steps": 4, "micro_batch": size}, valid={"every": 0}) for size in (8, 1)
    )
    train(whole)
    train(pieces)
    # fp32 sums in another order, amplified by four steps of AdamW.
    assert losses(pieces) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.moderate
def test_training_lowers_the_loss_from_its_start(small_run: SmallRun) -> None:
    config = small_run.config("long", train={"steps": 40, "micro_batch": 8, "lr": 1e-2}, valid={"every": 0})
    train(config)
    assert losses(config)[0] > 2 and losses(config)[-1] < 1.6


@pytest.mark.moderate
def test_bf16_autocast_stays_close_to_fp32(small_run: SmallRun) -> None:
    fp32, bf16 = (
        small_run.config(name, train={"steps": 4, "precision": name}, valid={"every": 0}) for name in ("fp32", "bf16")
    )
    train(fp32)
    train(bf16)
    assert losses(bf16) != losses(fp32)
    assert losses(bf16) == pytest.approx(losses(fp32), rel=2e-2)  # 8 bits of mantissa


@pytest.mark.moderate
def test_next_base_objective_trains_the_unidirectional_baseline(small_run: SmallRun) -> None:
    model = {"rcps": False, "bidirectional": False}
    keys = {"steps": 40, "micro_batch": 8, "lr": 1e-2}
    config = small_run.config("next", model=model, data={"objective": "next_base"}, train=keys, valid={"every": 0})
    train(config)
    assert losses(config)[-1] < 1.6


@pytest.mark.moderate
def test_compile_and_checkpointing_change_nothing(small_run: SmallRun) -> None:
    plain = small_run.config("plain", train={"steps": 3})
    recomputed = small_run.config("recomputed", train={"steps": 3, "activation_checkpointing": "block"})
    train(plain)
    train(recomputed)
    assert losses(recomputed) == losses(plain)


@pytest.mark.slow
def test_compiled_blocks_train_the_same_run(small_run: SmallRun) -> None:
    plain, compiled = (
        small_run.config(str(on), train={"steps": 3, "compile": on}, valid={"every": 0}) for on in (False, True)
    )
    train(plain)
    train(compiled)
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)  # fused kernels round otherwise


@pytest.mark.slow
def test_killed_at_random_instants_the_run_goes_on_bit_for_bit(small_run: SmallRun, tmp_path: Path) -> None:
    steps = {"steps": 30}
    undisturbed, killed = small_run.config("undisturbed", train=steps), small_run.config("killed", train=steps)
    consumed = tmp_path / "consumed.jsonl"
    train(undisturbed)
    rng = random.Random(0)
    for _ in range(3):
        process = small_run.start(killed, consumed)
        before = len(RunDirectory(killed.run.dir).metrics())
        while len(RunDirectory(killed.run.dir).metrics()) < before + rng.randrange(1, 9) and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = small_run.start(killed, consumed)
    message = process.communicate()[1]
    assert process.returncode == 0, message
    assert numbers(killed.run.dir) == numbers(undisturbed.run.dir)
    assert consumed_samples(consumed) == list(range(30 * 8))


@pytest.mark.slow
def test_killed_with_its_workers_alive_the_same_command_goes_on_at_once(small_run: SmallRun) -> None:
    config = small_run.config("killed", train={"steps": 400}, data={"workers": 2}, valid={"every": 0})
    process, run = small_run.start(config), RunDirectory(config.run.dir)
    while not run.metrics():
        time.sleep(0.01)
        assert process.poll() is None, process.communicate()[1]
    workers = [pid for pid in children_of(process.pid) if b"recording_run" in command_of(pid)]
    process.kill()
    config.train.steps, config.run.allow_change = 6, ["train.steps"]
    assert len(workers) == 2 and all(command_of(pid) for pid in workers), "their parent is gone, and they are not yet"
    assert train(config) == 0
    process.communicate()


@pytest.mark.slow
def test_a_process_that_was_frozen_while_another_took_over_leaves_no_trace(small_run: SmallRun) -> None:
    undisturbed, frozen = (small_run.config(name, train={"steps": 30}) for name in ("undisturbed", "frozen"))
    train(undisturbed)
    process, run = small_run.start(frozen), RunDirectory(frozen.run.dir)
    while len(run.metrics()) < 2:
        time.sleep(0.005)
        assert process.poll() is None, process.communicate()[1]
    process.send_signal(signal.SIGSTOP)
    run.shut_out_holder()
    assert train(frozen) == 0
    process.send_signal(signal.SIGCONT)
    message = process.communicate(timeout=300)[1]
    assert process.returncode != 0 and "was taken over by another process" in message
    assert numbers(frozen.run.dir) == numbers(undisturbed.run.dir)
    assert run.checkpoints()[-1].step == 30 and run.checkpoints()[-1].damage() is None


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGUSR2", "STOP"])
def test_asked_to_stop_it_saves_and_the_same_command_goes_on(small_run: SmallRun, how: str) -> None:
    steps = {"steps": 300}
    config = small_run.config("stopped", train=steps, valid={"every": 0}, checkpoint={"every": 1000})
    process = small_run.start(config)
    run = RunDirectory(config.run.dir)
    while len(run.metrics()) < 3:
        time.sleep(0.01)
        assert process.poll() is None, process.communicate()[1]
    if how == "STOP":
        (run.path / "STOP").touch()
    else:
        process.send_signal(getattr(signal, how))
    message = process.communicate(timeout=300)[1]
    assert process.returncode == EXIT_REQUEUE, message
    stopped_after = run.checkpoints()[-1].step
    assert [row["step"] for row in run.metrics()] == list(range(1, stopped_after + 1))
    config.train.steps, config.run.allow_change = stopped_after + 2, ["train.steps"]
    process = small_run.start(config)
    message = process.communicate(timeout=300)[1]
    assert process.returncode == 0, message
    assert run.checkpoints()[-1].step == stopped_after + 2


@pytest.mark.moderate
def test_save_makes_a_checkpoint_and_goes_on(small_run: SmallRun) -> None:
    config = small_run.config("saving", checkpoint={"every": 1000, "keep": 0})
    run = RunDirectory.create_or_resume(config)
    run.release()
    (run.path / "SAVE").touch()
    assert train(config) == 0
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [1, 10]
    assert not (run.path / "SAVE").exists()


@pytest.mark.moderate
@pytest.mark.parametrize(("how", "told"), [("bit flipped", "sha256"), ("truncated", "bytes instead of")])
def test_a_damaged_newest_checkpoint_costs_only_its_steps(small_run: SmallRun, caplog, how: str, told: str) -> None:
    steps = {"steps": 6}
    whole, damaged = small_run.config("whole", train=steps), small_run.config("damaged", train=steps)
    train(whole)
    train(damaged)
    newest = RunDirectory(damaged.run.dir).checkpoints()[-1].path
    damage(newest, how)
    assert train(damaged) == 0
    assert str(newest) in caplog.text and told in caplog.text
    assert newest.with_name(f"damaged-{newest.name}").is_dir()
    assert numbers(damaged.run.dir) == numbers(whole.run.dir)


@pytest.mark.moderate
def test_where_the_only_checkpoint_is_damaged_the_run_starts_again(small_run: SmallRun, caplog) -> None:
    checkpoint = {"every": 2, "keep": 1}
    whole, damaged = (
        small_run.config(name, train={"steps": 4}, checkpoint=checkpoint) for name in ("whole", "damaged")
    )
    train(whole)
    run = RunDirectory(damaged.run.dir)
    for start in range(2):  # each in a run directory where an earlier one is set aside
        damaged.train.steps, damaged.run.allow_change = 2 * start + 2, ["train.steps"]
        assert train(damaged) == 0
        (only,) = run.checkpoints()
        damage(only.path, "bit flipped")
    caplog.clear()
    assert train(damaged) == 0
    assert "no checkpoint is whole: the run starts again from its beginning" in caplog.text
    assert numbers(run.path) == numbers(whole.run.dir)
    names = sorted(path.name for path in run.checkpoints_path.iterdir())
    assert names == ["damaged-step-00000004", "latest", "step-00000004"]
    assert run.checkpoints()[0].damage() is None


@pytest.mark.moderate
def test_where_the_newest_of_two_is_damaged_the_other_stays_until_there_is_a_new_one(small_run: SmallRun) -> None:
    config = small_run.config("run", train={"steps": 4}, checkpoint={"every": 2, "keep": 2})
    train(config)
    run = RunDirectory(config.run.dir)
    older, newest = run.checkpoints()
    damage(newest.path, "truncated")
    config.checkpoint.keep, config.run.time_budget_minutes = 1, 1e-6  # up after one step
    assert train(config) == EXIT_REQUEUE
    (saved,) = run.checkpoints()  # only now has the older one gone
    assert saved.step == older.step + 1 and saved.damage() is None
    assert newest.path.with_name(f"damaged-{newest.path.name}").is_dir()


def damage(checkpoint: Path, how: str) -> None:
    weights = checkpoint / "__0_0.distcp"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content[:-1] if how == "truncated" else content)


@pytest.mark.moderate
def test_a_checkpoint_of_another_model_or_dataset_is_refused(small_run: SmallRun, tmp_path: Path) -> None:
    train(small_run.config("run", train={"steps": 3}))
    with pytest.raises(UserError, match=r"model\.d_state=4, not 8"):
        train(small_run.config("run", train={"steps": 3}, model={"d_state": 8}))
    allowed = {"allow_change": ["model.d_state"]}
    with pytest.raises(UserError, match="not a checkpoint of this model"):
        train(small_run.config("run", train={"steps": 3}, model={"d_state": 8}, run=allowed))
    write_random_fasta(tmp_path / "other.fa", 2, {"chr1": 30_000, "chr3": 10_000})
    shard(tmp_path / "other", "other", tmp_path / "other.fa", "--window", "2048", "--valid-contigs", "chr3")
    with pytest.raises(UserError, match="fingerprint"):
        train(small_run.config("run", train={"steps": 3}, data={"path": str(tmp_path / "other")}))


@pytest.mark.slow
def test_mistakes_on_the_command_line_are_one_line_and_status_2(small_run: SmallRun, tmp_path: Path) -> None:
    config = small_run.config("run")
    save_config(config, tmp_path / "config.yaml")
    for override, named in {
        "train.stesp=3": "train.stesp",
        "data.path=/nowhere": "/nowhere",
        "data.seq_len=4096": "data.seq_len",
        "train.global_batch=6": "train.global_batch",
        "ops.backend=abacus": "ops.backend",
    }.items():
        command = [sys.executable, "-m", "caduceus.train", "--config", str(tmp_path / "config.yaml"), override]
        result = preloaded.run(command, capture_output=True, text=True)
        errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        assert result.returncode == 2 and len(errors) == 1 and named in errors[0], result.stderr
        assert "Traceback" not in result.stderr
        assert not Path(config.run.dir).exists()


@pytest.mark.slow
def test_wandb_offline_keeps_one_run_id_over_restarts(small_run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "")
    config = small_run.config("watched", train={"steps": 3}, wandb={"mode": "offline"})
    train(config)
    config.train.steps, config.run.allow_change = 6, ["train.steps"]
    train(config)
    runs = list((Path(config.run.dir) / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert len({path.name.rsplit("-", 1)[1] for path in runs}) == 1
    assert all(list(path.glob("*.wandb")) for path in runs)


@pytest.mark.moderate
def test_a_batch_without_a_label_has_no_loss_and_no_gradient(small_run: SmallRun) -> None:
    config = small_run.config("unlabelled", data={"mask_prob": 1e-9}, train={"steps": 2}, valid={"every": 0})
    train(config)
    rows = numbers(config.run.dir)
    assert [(row["loss"], row["grad_norm"]) for row in rows] == [(0.0, 0.0)] * 2


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small tensors are faster so, and sums come out the same on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
