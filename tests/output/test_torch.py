"""Datasets for PyTorch: a DataLoader yields what was written, and a network can be trained on it."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_convert_masks import LEFT_BOX, RIGHT_BOX, Ct, rtstruct

import gpuprep
from gpuprep import Masks, Recipe
from gpuprep.errors import OutputError, RequestError
from gpuprep.testing import write_series

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'gpuprep[torch]'")

from torch.utils.data import DataLoader  # noqa: E402

from gpuprep.torch import CohortDataset  # noqa: E402

RAW = Recipe(spacing_mm=None, size=None, format="npy")
SHAPE = (6, 20, 24)


def make(root: Path, recipe: Recipe = RAW, *, masked: int = 2, plain: int = 0) -> Path:
    """Convert series of equal shape: `masked` ones with two structures each, then `plain` ones without."""
    for n in range(masked):
        rtstruct(root / f"rs{n}.dcm", Ct(root / "dicom" / f"m{n}"))
    for n in range(plain):
        stored = np.random.default_rng(n).integers(0, 3000, SHAPE).astype(np.int16)
        write_series(root / "dicom" / f"p{n}", stored, (2.5, 0.8, 0.7))
    segmentations = [root / f"rs{n}.dcm" for n in range(masked)]
    run = gpuprep.convert(root / "dicom", root / "out", recipe, masks=segmentations or None, backend="cpu")
    assert run.counts == {"ok": masked + plain}
    return root / "out"


def test_an_item_has_image_labels_and_affine(tmp_path: Path) -> None:
    dataset = CohortDataset(make(tmp_path))
    assert len(dataset) == 2
    assert dataset.structures == {"left": 1, "right": 2}
    image, label, meta = dataset[1]
    assert (image.shape, image.dtype) == ((1, *SHAPE), torch.float32)
    assert (label.shape, label.dtype) == ((1, *SHAPE), torch.int64)
    volume = gpuprep.load(tmp_path / "dicom" / "m1", RAW, backend="cpu")
    np.testing.assert_array_equal(image[0], volume.values)
    np.testing.assert_array_equal(label[0], LEFT_BOX + 2 * RIGHT_BOX)
    assert meta["folder"] == "dicom/m1"
    np.testing.assert_array_equal(meta["affine_lps"], volume.affine)
    np.testing.assert_array_equal(meta["spacing_mm"], volume.spacing_mm)
    assert meta["start"].tolist() == [0, 0, 0]
    assert dataset[-1][2]["key"] == meta["key"]
    with pytest.raises(IndexError):
        dataset[2]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_windowed_values_are_0_to_1_in_every_dtype(tmp_path: Path, dtype: Any) -> None:
    (image, *_), truth = (
        CohortDataset(make(tmp_path, replace(RAW, dtype=dtype), masked=0, plain=1))[0],
        gpuprep.load(tmp_path / "dicom", RAW, backend="cpu"),
    )
    assert (
        np.abs(image[0].numpy() - np.asarray(truth)).max()
        <= {"uint8": 0.5 / 255, "uint16": 0.5 / 65535}.get(dtype, 0) + 1e-7
    )


def test_int16_values_are_hu(tmp_path: Path) -> None:
    image, *_ = CohortDataset(make(tmp_path, replace(RAW, dtype="int16", window_hu=None), masked=0, plain=1))[0]
    stored = np.random.default_rng(0).integers(0, 3000, SHAPE)
    np.testing.assert_array_equal(image[0], stored - 1024)


def test_separate_label_volumes_become_channels(tmp_path: Path) -> None:
    dataset = CohortDataset(make(tmp_path, replace(RAW, masks=Masks(layout="per-roi"))))
    assert dataset.structures == {"left": 0, "right": 1}
    _, label, _ = dataset[0]
    np.testing.assert_array_equal(label, [LEFT_BOX, RIGHT_BOX])


def test_series_without_masks_are_left_out_of_labelled_datasets(tmp_path: Path) -> None:
    out = make(tmp_path, masked=1, plain=2)
    assert [folder for folder, _ in CohortDataset(out).series] == ["dicom/m0"]
    assert [folder for folder, _ in CohortDataset(out, labelled=True).series] == ["dicom/m0"]
    without = CohortDataset(out, labelled=False)
    assert [folder for folder, _ in without.series] == ["dicom/m0", "dicom/p0", "dicom/p1"]
    assert without[0][1].shape == (0, *SHAPE)


def test_a_cohort_without_masks_has_labels_with_zero_channels(tmp_path: Path) -> None:
    out = make(tmp_path, masked=0, plain=2)
    _, label, _ = next(iter(DataLoader(CohortDataset(out), batch_size=2)))
    assert label.shape == (2, 0, *SHAPE)
    with pytest.raises(RequestError, match="no finished image with masks"):
        CohortDataset(out, labelled=True)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.tuples(st.integers(1, 9), st.integers(1, 30), st.integers(1, 30)), seed=st.integers(0, 99))
def test_a_patch_equals_the_same_box_of_the_volume_padded_with_air(
    cohort: Any, size: tuple[int, int, int], seed: int
) -> None:
    out, volume = cohort
    torch.manual_seed(seed)
    image, label, meta = CohortDataset(out, patches=size)[0]
    assert image.shape == label.shape == (1, *size)
    # Independently: pad the volume with air, and index it at the position that the affine gives.
    place = np.linalg.solve(volume.affine, meta["affine_lps"].numpy()[:, 3])[:3]
    start = np.rint(place).astype(int)
    np.testing.assert_allclose(place, start, atol=1e-9)
    assert start.tolist() == meta["start"].tolist()
    around = tuple(slice(s + 40, s + 40 + n) for s, n in zip(start, size, strict=True))
    np.testing.assert_array_equal(image[0], np.pad(np.asarray(volume), 40)[around])
    np.testing.assert_array_equal(label[0], np.pad(LEFT_BOX + 2 * RIGHT_BOX, 40)[around])
    for first, wanted, available in zip(start, size, SHAPE, strict=True):
        assert 0 <= first <= available - wanted if wanted < available else first == -((wanted - available) // 2)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("torch")
    return make(root, masked=1), gpuprep.load(root / "dicom", RAW, backend="cpu")


def test_padding_of_hu_volumes_is_minus_1000_hu(tmp_path: Path) -> None:
    out = make(tmp_path, replace(RAW, dtype="int16", window_hu=None), masked=0, plain=1)
    image, *_ = CohortDataset(out, patches=(8, 20, 24))[0]
    assert set(image[0, 0].ravel().tolist()) == {-1000.0}


def test_patches_cover_all_positions_and_are_repeatable_with_a_seed(cohort: Any) -> None:
    dataset = CohortDataset(cohort[0], patches=(2, 5, 5), patches_per_volume=200)
    assert len(dataset) == 200

    def starts() -> list[list[int]]:
        torch.manual_seed(1)
        return [dataset[n][2]["start"].tolist() for n in range(200)]

    first = starts()
    assert {k for k, _, _ in first} == set(range(5))  # 6 slices, patches of 2
    assert starts() == first


def test_workers_draw_different_patches(cohort: Any) -> None:
    dataset = CohortDataset(cohort[0], patches=(1, 2, 2), patches_per_volume=8)
    torch.manual_seed(0)
    loader = DataLoader(dataset, batch_size=4, num_workers=2)
    one, other = (meta["start"] for _, _, meta in loader)  # a batch of each worker
    assert not torch.equal(one, other)


def test_a_pickled_dataset_still_applies_its_transform(cohort: Any) -> None:
    dataset = pickle.loads(pickle.dumps(CohortDataset(cohort[0], transform=_halved)))  # noqa: S301
    image, label = dataset[0]
    np.testing.assert_array_equal(image[0], np.asarray(cohort[1]) / 2)
    assert label.shape == (1, *SHAPE)


def _halved(image: Any, label: Any, _: Any) -> Any:
    return image / 2, label


def train(dataset: CohortDataset, steps: int) -> list[float]:
    """Train a tiny network on patches by two workers, and return its losses."""
    torch.manual_seed(0)
    loader = DataLoader(dataset, batch_size=2, shuffle=True, num_workers=2)
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(8, 2, 1))
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    losses: list[float] = []
    while len(losses) < steps:
        for image, label, _ in loader:
            loss = torch.nn.functional.cross_entropy(network(image), (label[:, 0] > 0).long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def test_a_network_learns_from_patches(tmp_path: Path) -> None:
    dataset = CohortDataset(make(tmp_path, replace(RAW, format="zarr")), patches=(4, 16, 16), patches_per_volume=4)
    losses = train(dataset, 24)
    assert np.isfinite(losses).all()
    assert np.mean(losses[-4:]) < np.mean(losses[:4])


def test_a_network_learns_from_real_series(data: Path, tmp_path: Path) -> None:
    recipe = Recipe(size=(128, 128), format="zarr", dtype="uint8", compression="zstd")
    out = tmp_path / "out"
    run = gpuprep.convert(data / "ibsi-sts-4", out, recipe, masks="auto", backend="cpu")
    assert set(run.counts) <= {"ok", "fixed"}
    dataset = CohortDataset(out, patches=(32, 64, 64))
    assert len(dataset) == 4
    losses = train(dataset, 4)
    assert np.isfinite(losses).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patches": (1, 2)}, "three positive whole numbers"),
        ({"patches": (0, 2, 2)}, "three positive whole numbers"),
        ({"patches": (1.5, 2, 2)}, "three positive whole numbers"),
        ({"patches": (1, 1, 1), "patches_per_volume": 1.5}, "positive whole number"),
        ({"patches_per_volume": 2}, "and patches"),
        ({"patches": (1, 1, 1), "patches_per_volume": 0}, "positive whole number"),
    ],
)
def test_invalid_patch_options_are_refused(cohort: Any, options: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        CohortDataset(cohort[0], **options)


def test_a_folder_that_is_no_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="has no manifest"):
        CohortDataset(tmp_path)
    with pytest.raises(RequestError, match="copy it to a disk"):
        CohortDataset("s3://bucket/out")


def test_a_lost_volume_is_named(tmp_path: Path) -> None:
    out = make(tmp_path, masked=1)
    dataset = CohortDataset(out)
    (out / "dicom" / "m0" / "volume.npy").unlink()
    with pytest.raises(OutputError, match=r"volume\.npy cannot be read \(No such file or directory\)"):
        dataset[0]


@pytest.mark.parametrize("changes", [{"dtype": "int16"}, {"window_hu": (-500.0, 100.0)}, {"window_hu": None}])
def test_recipes_whose_values_differ_in_meaning_are_refused(tmp_path: Path, changes: Any) -> None:
    for n, recipe in enumerate((RAW, replace(RAW, **changes))):
        gpuprep.convert(Ct(tmp_path / f"p{n}").folder, tmp_path / "out", recipe, backend="cpu")
    with pytest.raises(RequestError, match=r"recipes whose values differ \(.* HU.* and .* HU.*\): convert all series"):
        CohortDataset(tmp_path / "out")


def test_recipes_whose_values_mean_the_same_may_be_mixed(tmp_path: Path) -> None:
    for n, recipe in enumerate((RAW, replace(RAW, format="zarr", dtype="uint16"))):
        gpuprep.convert(Ct(tmp_path / f"p{n}").folder, tmp_path / "out", recipe, backend="cpu")
    (one, _, _), (other, _, _) = CohortDataset(tmp_path / "out")
    # By hand: stored values 0, 1, 2, … are −1024, −1023, … HU, and the window is −1000 to 400 HU.
    exact = np.clip((np.arange(np.prod(SHAPE)).reshape(SHAPE) - 24) / 1400, 0, 1)
    np.testing.assert_allclose(one[0], exact, rtol=0, atol=1e-6)
    np.testing.assert_allclose(other[0], exact, rtol=0, atol=0.51 / 65535)


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_workers_give_the_same_items_as_this_process(tmp_path: Path, way: str) -> None:
    dataset = CohortDataset(make(tmp_path, replace(RAW, format="zarr", masks=Masks(layout="per-roi"))))
    here = [dataset[n] for n in range(2)]  # starts threads of Zarr, which a fork does not copy
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context=way)
    for (image, label, meta), (image_, label_, meta_) in zip(loader, here, strict=True):
        assert torch.equal(image, image_)
        assert torch.equal(label, label_)
        assert meta["key"] == meta_["key"]
        np.testing.assert_array_equal(label, np.stack([LEFT_BOX, RIGHT_BOX]))


def test_a_lost_output_is_one_line(tmp_path: Path) -> None:
    out = make(tmp_path)
    dataset = CohortDataset(out)
    shutil.rmtree(out / "dicom" / "m1")
    with pytest.raises(OutputError, match=r"dicom/m1 is no finished output") as caught:
        dataset[1]
    assert str(caught.value).count("see gpuprep verify") == 1
