"""Output folders are named after source folders, are unique, and have harmless names."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpuprep.core.series import Series
from gpuprep.output.paths import assign_folders


def series(folder: str, uid: str = "1.2.3", *, number: int | None = 1, part: int = 0) -> Series:
    return Series(
        series_uid=uid, study_uid="", frame_of_reference_uid="", series_number=number, rows=4, columns=4,
        pixel_spacing_mm=None, orientation=None, part=part, folder=folder, slices=(),
    )  # fmt: skip


def folders(cohort: Iterable[Series], *inputs: str, taken: dict[str, str] | None = None) -> list[str]:
    """Return the folder of each series, in the order of the cohort."""
    cohort = list(cohort)
    found = assign_folders(cohort, inputs, taken or {})
    assert set(found) == {s.key for s in cohort}
    return [found[s.key] for s in cohort]


def test_output_folders_begin_with_the_name_of_a_single_input() -> None:
    cohort = [series("/data/cohort/p1/ct", "1.1"), series("/data/cohort/p2/a/b", "1.2")]
    assert folders(cohort, "/data/cohort") == ["cohort/p1/ct", "cohort/p2/a/b"]


def test_files_directly_in_the_input_go_to_a_folder_of_its_name() -> None:
    assert folders([series("/data/cohort")], "/data/cohort/") == ["cohort"]


def test_output_folders_of_several_inputs_are_relative_to_their_common_parent() -> None:
    cohort = [series("/data/a/ct", "1.1"), series("/data/b/ct", "1.2")]
    assert folders(cohort, "/data/a", "/data/b") == ["a/ct", "b/ct"]
    cohort = [series("/data/a/x/ct", "1.1"), series("/data/b/ct", "1.2")]
    assert folders(cohort, "/data/a/x", "/data/b") == ["a/x/ct", "b/ct"]


def test_an_input_inside_another_input_changes_nothing() -> None:
    assert folders([series("/data/a/x")], "/data/a", "/data/a/x", "/data/a") == ["a/x"]


def test_a_relative_input_is_resolved_to_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cohort" / "ct").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cohort")
    assert folders([series(str(tmp_path / "cohort" / "ct"))], ".") == ["cohort/ct"]


def test_a_single_file_goes_to_a_folder_named_like_its_parent(tmp_path: Path) -> None:
    file = tmp_path / "ct" / "1.dcm"
    file.parent.mkdir()
    file.touch()
    assert folders([series(str(file.parent))], str(file)) == ["ct"]


def test_a_series_in_several_inputs_is_named_by_its_label() -> None:
    only = series("/data", "1.2.3", number=7)
    assert folders([only], "/data/a", "/data/b") == [only.label]


def test_a_series_outside_of_the_inputs_gets_a_folder_inside_out() -> None:
    outside = series("/elsewhere/ct", "1.2.3")
    assert folders([outside], "/data/a") == [outside.label]


def test_series_that_share_a_folder_get_separate_subfolders() -> None:
    # Trap 33. Digests of the UIDs by sha256sum.
    cohort = [
        series("/data/ct", "1.2.3", number=2), series("/data/ct", "1.2.4", number=None),
        series("/data/ct", "1.2.5", number=3, part=1), series("/data/ct", "1.2.5", number=3, part=2),
    ]  # fmt: skip
    assert folders(cohort, "/data/ct") == [
        "ct/series-2-c47f5b", "ct/series-x-30f3fa", "ct/series-3-0a5d71-part1", "ct/series-3-0a5d71-part2",
    ]  # fmt: skip


def test_series_with_equal_folder_number_and_digest_get_different_names() -> None:
    # Found by search: SHA-256 of both UIDs begins with f607e5.
    one, two = folders([series("/data/ct", "1.2.4040"), series("/data/ct", "1.2.10882")], "/data/ct")
    assert one == "ct/series-1-f607e5"
    assert PurePosixPath(two).name.startswith("series-1-f607e5-")


def test_a_series_whose_folder_contains_another_series_gets_a_subfolder() -> None:
    # An output folder is replaced as a whole, so it may not contain another output.
    cohort = [series("/data/ct", "1.1"), series("/data/ct/more/deep", "1.2")]
    assert folders(cohort, "/data/ct") == [f"ct/{cohort[0].label}", "ct/more/deep"]


def test_folders_of_equal_names_in_different_parents_get_different_names() -> None:
    # Trap 33.
    cohort = [series(f"/data/cohort/00{n}/ct", f"1.{n}") for n in range(5)]
    assert folders(cohort, "/data/cohort") == [f"cohort/00{n}/ct" for n in range(5)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a\nb", "a%0Ab"),
        ("\x1b[31mred", "%1B[31mred"),
        (os.fsdecode(b"caf\xe9"), "caf%E9"),
        ("café", "café"),
        ("a\u202eb", "a%E2%80%AEb"),  # turns the direction of writing
        ("  two  spaces ", "  two  spaces "),
        ("-rf", "-rf"),
        ("..x", "..x"),
        ("...", "..."),
        ("~", "~"),
    ],
)
def test_only_unprintable_characters_of_names_are_escaped(name: str, expected: str) -> None:
    assert folders([series(f"/data/cohort/{name}/ct")], "/data/cohort") == [f"cohort/{expected}/ct"]


@pytest.mark.parametrize(
    "name", [".gpuprep", ".gpuprep-2", "manifest.sqlite", "manifest.sqlite-wal", "manifest.csv", "recipe.toml"]
)
def test_names_that_gpuprep_uses_are_escaped_at_the_top(name: str) -> None:
    at_top, below = folders(
        [series(f"/data/{name}", "1.1"), series(f"/data/x/{name}", "1.2")], "/data/x", "/data/" + name
    )
    assert at_top == f"%{ord(name[0]):02X}{name[1:]}"
    assert below == f"x/{name}"


def test_names_that_are_equal_after_escaping_get_different_folders() -> None:
    cohort = [series("/data/a\n", "1.1"), series("/data/a%0A", "1.2")]
    one, two = folders(cohort, "/data/a\n", "/data/a%0A")
    assert one != two
    assert {PurePosixPath(one).parent.name, PurePosixPath(two).parent.name} == {"a%0A"}


def test_a_long_name_that_is_not_utf_8_is_a_valid_folder_name(tmp_path: Path) -> None:
    # 100 letters of a Cyrillic code page are a legal name of 100 bytes.
    name = os.fsdecode(b"\xef" * 100)
    (folder,) = folders([series(f"/data/cohort/{name}")], "/data/cohort")
    (tmp_path / folder).mkdir(parents=True)


def test_a_series_keeps_the_folder_that_an_earlier_run_gave_it() -> None:
    assert folders([series("/data/ct", "1.2.3")], "/data/ct", taken={"ct": "1.2.3"}) == ["ct"]


@pytest.mark.parametrize("taken", ["ct", "ct/LABEL", "ct/more", "ct/more/deep"])
def test_a_folder_that_is_or_contains_another_output_is_not_assigned(taken: str) -> None:
    # An output folder is replaced as a whole, so the other output would be lost.
    new = series("/data/ct", "1.2.4")
    taken = taken.replace("LABEL", new.label)
    (folder,) = folders([new], "/data/ct", taken={taken: "1.2.3"})
    assert folder not in {taken, *map(str, PurePosixPath(taken).parents)}


def test_a_series_whose_path_is_taken_gets_a_sibling_folder() -> None:
    # For example several sites with equal folder names, converted one after the other. Digests by sha256sum.
    taken: dict[str, str] = {}
    for site, expected in (("1.2.3", "dicom/p1"), ("1.2.4", "dicom/p1-series-1-30f3fa"),
                           ("1.2.5", "dicom/p1-series-1-0a5d71")):  # fmt: skip
        new = [series(f"/site-{site}/dicom/p1", site)]
        assert folders(new, f"/site-{site}/dicom", taken=taken) == [expected]
        taken[expected] = site
        assert folders(new, f"/site-{site}/dicom", taken=taken) == [expected]  # and again


def test_a_series_inside_the_output_of_another_gets_a_sibling_folder() -> None:
    assert folders([series("/data/ct/a/b", "1.2.3")], "/data/ct", taken={"ct": "1.2.4"}) == ["ct-series-1-c47f5b"]


def test_a_series_above_the_output_of_another_gets_a_subfolder() -> None:
    assert folders([series("/data/ct", "1.2.3")], "/data/ct", taken={"ct/a/b": "1.2.4"}) == ["ct/series-1-c47f5b"]


def test_a_series_keeps_its_folder_when_others_join_its_source_folder() -> None:
    cohort = [series("/data/ct", "1.2.3"), series("/data/ct", "1.2.4"), series("/data/ct/more", "1.2.5")]
    for order in (cohort, cohort[::-1]):
        found = dict(zip((s.series_uid for s in order), folders(order, "/data/ct", taken={"ct": "1.2.3"}), strict=True))
        assert found == {"1.2.3": "ct", "1.2.4": "ct-series-1-30f3fa", "1.2.5": "ct-series-1-0a5d71"}


def test_the_sibling_of_a_name_of_maximum_length_is_not_longer() -> None:
    name = "x" * 255
    (folder,) = folders([series(f"/data/{name}", "1.2.3")], "/data", taken={f"data/{name}": "1.2.4"})
    assert folder.startswith("data/xxx")
    assert len(PurePosixPath(folder).name) == 255


def test_a_source_folder_named_like_a_label_is_not_shared() -> None:
    # For example if the input is itself an output of gpuprep.
    first, second = series("/data/ct", "1.1"), series("/data/ct", "1.2")
    third = series(f"/data/ct/{first.label}", "1.3")
    for cohort in ([first, second, third], [third, second, first]):
        assert_apart(folders(cohort, "/data/ct"))


def assert_apart(found: list[str]) -> None:
    """Assert that no two folders are equal, and that none contains another."""
    assert len(set(found)) == len(found)
    for folder in found:
        assert not {str(p) for p in PurePosixPath(folder).parents} & set(found)


hostile = st.sampled_from(
    ["a", "b", "ct", "..a", "...", ".gpuprep", "manifest.sqlite", "recipe.toml", "a\n", "a%0A", "%2Egpuprep", "\x7f"]
) | st.binary(min_size=1, max_size=6).filter(lambda b: b not in (b".", b"..") and not {0, 47} & set(b)).map(os.fsdecode)
trees = st.lists(st.lists(hostile, max_size=4), min_size=1, max_size=12)


@settings(deadline=None)
@given(trees, st.lists(hostile, min_size=1, max_size=2), st.booleans())
@example([[], ["a"], ["a", "b"], ["a"], ["a"]], ["x"], False)
@example([["a\n"], ["a%0A"], [".gpuprep"], ["%2Egpuprep"]], [".gpuprep"], True)
def test_no_two_series_share_a_folder_and_all_lie_inside_out(
    tree: list[list[str]], root: list[str], wide: bool
) -> None:
    top = "/" + "/".join(root)
    cohort = [series("/".join([top, *names]), f"1.{n}") for n, names in enumerate(tree)]
    inputs = ["/" + "/".join([*root, names[0]]) if names else top for names in tree] if wide else [top]
    found = folders(cohort, *inputs)
    assert_apart(found)
    for folder in found:
        assert folder == os.path.normpath(folder)
        assert not folder.startswith("/")
        assert ".." not in folder.split("/")
        assert not folder.startswith((".gpuprep", "manifest.", "recipe.toml"))
        assert folder.isprintable()
        assert folder.encode("utf-8")
    # The next run, for which these folders are taken, assigns the same.
    taken = dict(zip(found, (s.key for s in cohort), strict=True))
    assert folders(cohort, *inputs, taken=taken) == found


@settings(deadline=None)
@given(trees, st.integers(0, 12))
def test_a_growing_cohort_never_reassigns_a_folder(tree: list[list[str]], first: int) -> None:
    cohort = [series("/".join(["/data", *names]), f"1.{n}") for n, names in enumerate(tree)]
    before = dict(zip(folders(cohort[:first], "/data"), (s.key for s in cohort[:first]), strict=True))
    after = folders(cohort, "/data", taken=before)
    assert len(set(after)) == len(after)
    for folder, s in zip(after, cohort, strict=True):
        assert before.get(folder, s.key) == s.key


@settings(deadline=None)
@given(st.lists(trees, min_size=2, max_size=3))
@example([[["a"]], [["a"]], [["a"]]])
@example([[["a", "b"]], [["a"]], [["a", "b", "ct"]]])
def test_outputs_of_several_runs_never_contain_each_other(runs: list[list[list[str]]]) -> None:
    taken: dict[str, str] = {}
    for n, tree in enumerate(runs):
        cohort = [series("/".join([f"/site{n}", "data", *names]), f"{n}.{m}") for m, names in enumerate(tree)]
        found = folders(cohort, f"/site{n}/data", taken=taken)
        taken |= dict(zip(found, (s.key for s in cohort), strict=True))
        assert len(taken) == sum(map(len, runs[: n + 1]))
        assert_apart(list(taken))
