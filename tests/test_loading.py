"""Does a saved run load, or get one sentence?"""

from pathlib import Path

import pytest

from reports import schema
from reports.load import ReportError, newest_runs, quality_change
from tests.constructed_runs import changed, constructed_run, main, save


def test_the_constructed_run_is_valid_and_says_that_it_is_constructed(constructed):
    schema.validate_run(constructed)
    assert "no machine" in constructed["machine_info"]["cpu"]["brand_raw"]


BAD_FILES = {
    "truncated": ('{"benchmarks": [', "not JSON"),
    "not an object": ("[1, 2]", "holds a JSON list"),
    "nan": ('{"benchmarks": [], "machine_info": {"x": NaN}}', "bare NaN"),
    "other program": ('{"results": []}', "no benchmarks and no machine_info"),
    "no list": ('{"benchmarks": 3, "machine_info": {}}', "is not a run of this study"),
    "no cell": ('{"benchmarks": [], "machine_info": {}}', "no measured cell"),
    "foreign": (
        '{"benchmarks": [{"name": "x", "stats": {"median": 1}, "extra_info": {}}], '
        '"machine_info": {}}',
        "missing: extra_info.cell",
    ),
    "not text": ("\udcff\udcfe", "not JSON"),
}


@pytest.mark.parametrize("command", ["build", "compare", "merge", "findings", "recommend", "check"])
@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_get_one_sentence_with_the_remedy(command, kind, tmp_path, capsys):
    text, said = BAD_FILES[kind]
    bad = tmp_path / "bad.json"
    bad.write_bytes(text.encode("utf-8", "surrogateescape"))
    if command == "merge" and kind == "no cell":
        return  # an empty shard is a shard
    assert main(command_line(command, bad, tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert str(bad) in error


def command_line(command, path, folder):
    return [command, *{
        "compare": [path, path],
        "merge": [folder / "out.json", path],
        "build": [path, "--out", folder / "out"],
    }.get(command, [path])]  # fmt: skip


@pytest.mark.parametrize("command", ["build", "compare", "merge", "recommend", "check"])
def test_a_missing_file_is_named(command, tmp_path, capsys):
    missing = tmp_path / "missing.json"
    assert main(command_line(command, missing, tmp_path)) == 2
    assert f"{missing} does not exist" in capsys.readouterr().err


def test_a_value_of_the_wrong_type_is_named(constructed, run_of):
    with pytest.raises(ReportError, match=r"malformed: benchmarks\.\d+\.extra_info\.speedup"):
        run_of(changed(constructed, "eager", speedup="fast"))


def test_an_old_run_with_fewer_keys_still_loads(constructed, run_of):
    old = changed(constructed, "none")
    for benchmark in old["benchmarks"]:
        del benchmark["extra_info"]["mfu"]
    assert run_of(old).records


def test_other_benchmarks_in_the_file_are_counted_and_left_out(constructed, run_of):
    run = {**constructed, "benchmarks": [*constructed["benchmarks"], {
        "name": "theirs", "fullname": "theirs", "group": None, "extra_info": {},
        "stats": {"median": 1.0}}]}  # fmt: skip
    loaded = run_of(run)
    assert loaded.foreign == 1
    assert len(loaded.records) == len(constructed["benchmarks"])


def test_the_newest_run_of_each_machine_is_taken(constructed, tmp_path):
    save(tmp_path / "old.json", constructed)
    save(tmp_path / "new.json", {**constructed, "datetime": "2000-02-02T00:00:00"})
    other = constructed_run(threads=1)
    save(tmp_path / "deep" / "other.json", other)
    (tmp_path / "junk.json").write_text("{")
    found = newest_runs([tmp_path])
    assert sorted(run.path.name for run in found) == ["new.json", "other.json"]


def test_no_saved_run_says_how_to_make_one(tmp_path):
    with pytest.raises(ReportError, match="make bench"):
        newest_runs([tmp_path])


def test_a_full_disk_keeps_the_old_page(small, tmp_path, monkeypatch, capsys):
    out, source = tmp_path / "out", save(tmp_path / "run.json", small)
    assert main(["build", source, "--out", out]) == 0
    before = (out / "report.html").read_bytes()

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["build", source, "--out", out]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert (out / "report.html").read_bytes() == before
    assert not list(out.glob("*.part"))


def test_an_output_folder_that_is_a_file_is_refused(small, tmp_path, capsys):
    source = save(tmp_path / "run.json", small)
    assert main(["build", source, "--out", source]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("delta", "error", "text"),
    [
        (0.0089, 0.008, "+0.0089 ± 0.0080"),
        (0.0001, 0.02, "+0.000 ± 0.020"),
        (-25.0, 3.0, "-25.0 ± 3.0"),
        (-9.62e-07, 6e-07, "unchanged"),
        (0.0, 0.0, "unchanged"),
        (3e-06, 0.0052, "+0.0000 ± 0.0052"),  # the mean is the same, the tokens are not
        (0.5, None, "+0.5"),
        (None, None, ""),
    ],
)
def test_a_change_has_the_digits_of_its_error(delta, error, text):
    metric = {"metric": "perplexity", "value": 17.7, "delta": delta, "stderr": error}
    assert quality_change(metric) == text
