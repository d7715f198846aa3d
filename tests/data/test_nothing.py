"""Training on nothing: a species, or a whole run, without a base to learn from is refused in one line at the start."""

import itertools
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from caduceus.config import Config, config_from_dict
from caduceus.data import build_loader, build_validation
from caduceus.errors import UserError
from caduceus.evaluate.heldout import held_out_loss
from caduceus.model.heads import CaduceusForMaskedLM
from tests.data.shard_fixture import Species, random_bases, tile, write_dataset
from tests.data.test_stream import write_tar

RNG = np.random.default_rng(0)
UPPER, LOWER = random_bases(RNG, 6000, "ACGT"), random_bases(RNG, 6000, "acgt")
MOST_LOWER = random_bases(RNG, 6000, "acgtn") + "ACG"
SHORT = 200


def species(name: str, bases: str, window: int = 2048, valid: bool = True) -> Species:
    windows = tile("c", len(bases), window)
    return Species(name, {"c": bases}, {"train": windows[:-1], "valid": windows[-1:]} if valid else {"train": windows})


@pytest.fixture
def over(configure: Callable[..., Config], tmp_path: Path) -> Callable[..., Config]:
    """A configuration over a dataset of these species."""

    def make(*all_species: Species, **data) -> Config:
        return configure(
            path=str(write_dataset(tmp_path / str(len(list(tmp_path.iterdir()))), list(all_species))), **data
        )

    return make


def refusal(config: Config, opened: Callable = build_loader) -> str:
    with pytest.raises(UserError) as error:
        opened(config)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("objective", ["mlm", "next_base"])
@pytest.mark.parametrize("bases", [LOWER, LOWER[:3000] + "N" * 900 + LOWER[:2100], "n" * 700 + LOWER[:5300]])
def test_a_genome_that_is_all_lower_case(over: Callable[..., Config], bases: str, objective: str) -> None:
    settings = {"objective": objective, "model": {"bidirectional": objective == "mlm"}}
    config = over(species("soft", bases), repeat_weight=0, **settings)
    for opened, split in ((build_loader, "train"), (build_validation, "valid")):
        assert refusal(config, opened) == (
            f"data.repeat_weight: 0, but all bases of species 'soft' in the split '{split}' are lower case "
            "(soft-masked), so no base counts; choose a weight above 0"
        )
    config.data.repeat_weight = 0.01
    build_loader(config)


@pytest.mark.parametrize("bases", [UPPER, MOST_LOWER, "n" * 3000 + LOWER[:1500] + "A" * 20 + LOWER[:1480]])
@pytest.mark.parametrize("seq_len", [64, 256])
def test_a_genome_with_upper_case_is_not_refused(over: Callable[..., Config], bases: str, seq_len: int) -> None:
    """Also where the index cannot tell, as there are more lower-case letters than ACGT."""
    one = Species("some", {"c": bases}, {"train": tile("c", len(bases), 3001)})
    assert build_loader(over(one, repeat_weight=0, seq_len=seq_len, min_acgt=0.0))


@pytest.mark.parametrize(
    ("useless", "settings", "problem"),
    [
        (
            species("other", UPPER, window=SHORT),
            {},
            "data.seq_len: 256 bases, but the longest window of species 'other'",
        ),
        (species("other", "ACGTN" + "N" * 4091), {"min_acgt": 0.1}, "data.min_acgt: no crop of 256 bases of species"),
        (species("other", LOWER), {"repeat_weight": 0}, "data.repeat_weight: 0, but all bases of species 'other'"),
    ],
)
def test_a_species_without_a_sequence_is_refused_or_left_out_as_asked(
    over: Callable[..., Config], useless: Species, settings: dict, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = over(species("good", UPPER), useless, **settings)
    for opened in (build_loader, build_validation):
        line = refusal(config, opened)
        assert line.startswith(problem) and line.endswith("allow this with data.allow_unused_species=true")
    config.data.allow_unused_species = True
    loader = build_loader(config)
    assert {loader.describe(g)["species"] for g in range(50)} == {"good"}
    assert build_validation(config).species == ["good"]
    assert f"left out, and its share goes to the others: {problem}" in caplog.text
    alone = over(useless, **settings)
    alone.data.allow_unused_species = True
    assert refusal(alone).startswith(problem)


def test_a_species_that_is_mostly_left_out_is_told(
    over: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    short = Species("short", {"c": UPPER}, {"train": [("c", 0, 600), *tile("c", 6000, 250)[3:]]})
    build_loader(over(species("good", UPPER), short))
    assert "train: crops hold only 8.8 % of the bases of short" in caplog.text  # 512 of 5,850
    assert "of good" not in caplog.text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mask_prob": 0.0}, "data.mask_prob: 0.0 labels no base"),
        ({"mask_prob": 1e-12}, "data.mask_prob: 1e-12 labels no base"),
        ({"mask_token_prob": 0.0, "random_token_prob": 0.0}, "data.mask_token_prob: .* the input shows every base"),
        ({"objective": "next_base", "seq_len": 1}, "data.seq_len: next_base needs at least 2"),
    ],
)
def test_keys_that_leave_nothing_to_learn(data: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_from_dict({"data": data, "model": {"bidirectional": "objective" not in data}})


def test_next_base_needs_no_masks() -> None:
    config_from_dict({"data": {"mask_prob": 0.0, "objective": "next_base"}, "model": {"bidirectional": False}})


@pytest.mark.moderate
@pytest.mark.parametrize("kind", ["between windows", "stream"])
def test_what_no_index_tells_is_found_while_training(
    over: Callable[..., Config], configure: Callable[..., Config], tmp_path: Path, kind: str
) -> None:
    if kind == "stream":
        tar = write_tar(tmp_path / "a.tar", {"a.seq": LOWER})
        config = configure(mode="stream", path=str(tar), repeat_weight=0, seq_len=4096)
    else:  # the only upper-case bases lie behind the last crop of their window
        one = Species("some", {"c": LOWER[:5000] + "ACGT"}, {"train": [("c", 0, 5004)]})
        config = over(one, repeat_weight=0, seq_len=4096)
    loader = build_loader(config)
    with pytest.raises(UserError, match=r"data: not one of the first 1,0\d\d,\d\d\d bases is labelled and counts"):
        list(itertools.islice(loader, 100))
    config.data.repeat_weight = 0.5
    list(itertools.islice(build_loader(config), 100))


def test_rare_labels_are_waited_for(over: Callable[..., Config]) -> None:
    """One upper-case base in 4,096."""
    bases = "".join(LOWER[:4095] + "A" for _ in range(3))
    loader = build_loader(
        over(Species("rare", {"c": bases}, {"train": [("c", 0, 12288)]}), repeat_weight=0, seq_len=4096)
    )
    assert len(list(itertools.islice(loader, 200))) == 200


def test_a_validation_without_a_labelled_base_is_refused(over: Callable[..., Config]) -> None:
    config = over(species("good", UPPER), seq_len=16, valid={"samples": 1}, mask_prob=1e-6)
    config.model.d_model, config.model.n_layer = 16, 1
    with pytest.raises(
        UserError, match=r"validation: no base is labelled and counts for the loss; raise valid\.samples"
    ):
        held_out_loss(CaduceusForMaskedLM(config.model), build_validation(config), torch.device("cpu"))
