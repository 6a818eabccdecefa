"""Batch jobs in one process: what they read, write, resume and refuse."""

import io
import json
import os
import sys
import tarfile
import time

import pytest
from batches import DAMAGED, do, photo, rows, success, write_images, write_model

from fastres.batch import BatchJob, Classifier, run_part
from fastres.batch.parts import UNNAMED, Ledger, Place, list_input

Image = pytest.importorskip("PIL.Image")
pa = pytest.importorskip("pyarrow")
pytest.importorskip("torchvision")
from pyarrow.fs import copy_files  # noqa: E402
from pyarrow.parquet import read_table, write_table  # noqa: E402

COUNT = 22


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("input")
    write_images(folder, COUNT)
    (folder / "notes.md").write_text("no image")
    (folder / ".hidden.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture
def job(model, folder, tmp_path):
    """Makes jobs on the folder, whose output is of this test."""

    def make(source=folder, output=tmp_path / "out", **options):
        known = {"model": str(model), "top": 2, "part_size": 5, "device": "cpu"}
        return BatchJob(source, output, **{**known, **options})

    return make


def ids_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.jpg"))


def test_a_folder_is_classified_as_one_classifier_would(job, folder, model, tmp_path):
    report = do(job())
    found, ids = rows(tmp_path / "out"), ids_in(folder)
    assert found["id"] == ids
    expected = Classifier(str(model), top=2).rows([(folder / i).read_bytes() for i in ids])
    assert found["labels"] == [row.labels for row in expected]
    assert found["error"] == [row.error for row in expected]
    assert found["width"] == [None if row.error else 60 for row in expected]
    for ours, theirs in zip(found["probabilities"], expected, strict=True):
        # A batch of another size may be summed in another order.
        assert ours == (theirs.probabilities and pytest.approx(theirs.probabilities, rel=1e-5))
    bad = {i for i, error in zip(ids, found["error"], strict=True) if error}
    assert bad == {f"{'ab'[k % 2]}/{k:03d}.jpg" for k in DAMAGED}
    assert report["errors"] == {"cannot read image: cannot identify image file": 3}
    assert (report["rows"], report["parts"], report["parts_done"]) == (COUNT, 5, 5)
    assert (report["duplicate_ids"], report["passed_over"]) == (0, 2)
    assert success(tmp_path / "out") == report
    assert not list((tmp_path / "out/.attempts").iterdir())


@pytest.mark.fault(94)
def test_a_resumed_job_does_only_what_is_missing(job, tmp_path):
    first = job()
    assert first.missing_parts() == [0, 1, 2, 3, 4]
    for index in (1, 3):
        run_part(first, index, first.classifier())
    out = tmp_path / "out"
    old = {path: path.stat().st_mtime_ns for path in out.glob("part-*")}
    swept = [out / ".part-000002.parquet.12.ab", out / ".attempts/.part-000002.json.12.ef"]
    for path in (*swept, out / ".part-000004.parquet.13.cd"):
        path.write_bytes(b"torn")
    for path in swept:
        os.utime(path, (time.time() - 7200,) * 2)
    with pytest.raises(ValueError, match=r"part-000000.parquet of output .* cannot be read"):
        first.finish()
    again = job()
    assert again.missing_parts() == [0, 2, 4]
    assert not any(path.exists() for path in swept)
    # The other may be of a process that is at work.
    assert (out / ".part-000004.parquet.13.cd").exists()
    assert do(again)["parts_done"] == 3
    assert {path: path.stat().st_mtime_ns for path in old} == old
    assert len(set(rows(out)["id"])) == COUNT
    assert do(job())["parts_done"] == 0


@pytest.mark.fault(96)
def test_another_job_is_refused_by_the_field_that_differs(job, folder, model, tmp_path):
    do(job())
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    other = tmp_path / "other"
    other.mkdir()
    write_images(other, COUNT - 1)
    for options, field in (
        ({"top": 1}, "top is 2, here it is 1"),
        ({"part_size": 6}, "part_size is 5"),
        ({"fast_decode": True}, "preprocessing.fast_decode is False"),
        ({"limit": 3}, "listing is"),
        ({"source": other}, "input is"),
        ({"model": str(write_model(tmp_path, seed=4))}, "weights_sha256 is"),
        ({"id_column": "id"}, "columns is"),
    ):
        with pytest.raises(ValueError, match=rf"output .* is of another job: its {field}"):
            job(**options).missing_parts()
    after = {path: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert after == before
    kept = json.loads(before[tmp_path / "out/_fastres.json"])
    versions = {"versions": {**kept["versions"], "fastres": "0.0"}}
    for change, field in (
        ({"dtype": "float16"}, "dtype is 'float16', here it is 'float32'"),
        (versions, "versions.fastres is '0.0'"),
    ):
        (tmp_path / "out/_fastres.json").write_text(json.dumps({**kept, **change}))
        with pytest.raises(ValueError, match=f"its {field}"):
            job().missing_parts()


def test_mistakes_are_said_before_anything_is_written(job, folder, tmp_path, model, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed/a.jpg").write_bytes(photo(0))
    (tmp_path / "mixed/a.tar").write_bytes(b"")
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    write_table(pa.table({"picture": [b""]}), tmp_path / "a.parquet")
    for options, message in (
        ({"part_size": 0}, "part_size must be an integer from 1 on; got 0"),
        ({"engine": "dask"}, "engine must be auto, local or ray; got 'dask'"),
        ({"source": tmp_path}, "output .* must not be inside the input"),
        ({"source": tmp_path / "none"}, "there is no input"),
        ({"source": tmp_path / "empty"}, "holds no images"),
        ({"source": tmp_path / "mixed"}, "holds images and tar: give a pattern of one"),
        ({"source": tmp_path / "mixed/*.tar", "limit": 2}, "limit does not go with tar files"),
        ({"source": tmp_path / "a.parquet"}, "image_column 'image' is not in .*, which has pict"),
        ({"source": "gopher://a/b"}, "gopher"),
        ({"labels": tmp_path / "names.txt"}, "labels must have a line for each of the 3 classes"),
        ({"model": "resnet5"}, "resnet5"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            job(**options).missing_parts()
        assert not (tmp_path / "out").exists()
    (tmp_path / "out/deep").mkdir(parents=True)
    (tmp_path / "out/deep/thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="must be a new or empty folder; it has thesis.tex"):
        job().missing_parts()
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with pytest.raises(ValueError, match="is a local path, and the machines of a cluster"):
        job()
    assert job(shared_fs=True).engine == "ray"


def test_a_list_keeps_duplicates_and_files_that_are_gone(job, folder, tmp_path):
    names = [str(folder / name) for name in ids_in(folder)[:4]]
    names += [names[0], str(folder / "gone.jpg"), "near.jpg"]
    (tmp_path / "near.jpg").write_bytes(photo(50))
    (tmp_path / "list.txt").write_text("\n".join(names) + "\n\n")
    report = do(job(tmp_path / "list.txt"))
    found = rows(tmp_path / "out")
    assert found["id"] == names
    assert found["labels"][4] == found["labels"][0]
    assert found["error"][5] == "there is no such file"
    assert report["duplicate_ids"] == 2


@pytest.mark.fault(96)
def test_a_file_that_vanishes_after_listing_is_an_error_row(job, tmp_path):
    source = tmp_path / "in"
    write_images(source, 3)
    work = job(source)
    work.missing_parts()
    (source / "a/000.jpg").unlink()
    do(work, [0])
    assert rows(tmp_path / "out")["error"] == ["there is no such file", None, None]


def test_tar_files_as_webdataset_writes_them(job, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for name, keys in (("0.tar", (0, 1, 2)), ("1.tar.gz", (2, 3)), ("2.tar", ())):
        with tarfile.open(source / name, "w:gz" if name.endswith("gz") else "w") as archive:
            for key in keys:
                for suffix, data in ((".jpg", photo(key)), (".cls", b"7")):
                    member = tarfile.TarInfo(f"set/{key}{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    report = do(job(source))
    assert rows(tmp_path / "out")["id"] == ["set/0", "set/1", "set/2", "set/2", "set/3"]
    assert (report["parts"], report["duplicate_ids"]) == (3, 2)
    cut = (source / "0.tar").read_bytes()[:1300]
    (source / "0.tar").write_bytes(cut)
    with pytest.raises(ValueError, match=r"cannot read .*0.tar: .*the job cannot go on with it"):
        do(job(source), [0])


@pytest.mark.parametrize("kind", ["bytes", "paths", "structs"])
def test_parquet_files_of_bytes_and_of_paths(kind, job, folder, tmp_path, model):
    names = ids_in(folder)[:7]
    (tmp_path / "in").mkdir()
    held = [(folder / name).read_bytes() for name in names]
    column = {
        "bytes": held,
        "paths": [str(folder / name) for name in names],
        "structs": [{"bytes": data, "path": None} for data in held],
    }[kind]
    table = pa.table({"img": column, "key": range(7), "other": [0] * 7})
    write_table(table, tmp_path / "in/a.parquet", row_group_size=3)
    report = do(job(tmp_path / "in", image_column="img", id_column="key", limit=5))
    found = rows(tmp_path / "out")
    assert found["id"] == ["0", "1", "2", "3", "4"]
    assert report["parts"] == 2
    expected = Classifier(str(model), top=2).rows(held[:5])
    assert found["labels"] == [row.labels for row in expected]


def test_limit_takes_the_first(job, folder, tmp_path):
    do(job(limit=7))
    assert rows(tmp_path / "out")["id"] == ids_in(folder)[:7]


def test_errors_are_tried_again_when_asked(job, tmp_path):
    source = tmp_path / "in"
    write_images(source, 12)
    assert sum(do(job(source))["errors"].values()) == 2
    (source / "b/003.jpg").write_bytes(photo(3))
    assert job(source).missing_parts() == []
    again = job(source, retry_errors=True)
    assert again.missing_parts() == [1]  # b/003.jpg and a/010.jpg are both in it
    assert sum(do(again)["errors"].values()) == 1


@pytest.mark.fault(96)
def test_a_full_disk_leaves_no_part_and_the_job_goes_on_later(job, tmp_path, monkeypatch):
    work = job()
    todo, held = work.missing_parts(), work.classifier()
    synced = os.fsync

    def full(descriptor):
        if "part-000001.parquet" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    work.run_part(0, held)
    with pytest.raises(OSError, match="No space left on device: .*part-000001.parquet"):
        work.run_part(1, held)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"_fastres.json", "_listing.parquet", "part-000000.parquet", ".attempts"}
    monkeypatch.undo()
    assert job().missing_parts() == todo[1:]
    do(job())
    assert len(set(rows(tmp_path / "out")["id"])) == COUNT


@pytest.mark.fault(95)
def test_the_ledger_blames_an_image_at_the_second_death(tmp_path):
    out = Place(tmp_path)
    assert not Ledger(out, 4).blames(7)
    for deaths in range(2):
        tried = Ledger(out, 4)  # the one before died
        assert tried.tries == 2 + deaths
        assert not tried.blames(7)
        tried.save(6)
        tried.save(7)
    tried = Ledger(out, 4)
    assert tried.blames(7)
    assert not tried.blames(6)
    tried.close()
    assert Ledger(out, 4).tries == 1
    for _ in range(8):
        Ledger(out, 4)
    with pytest.raises(RuntimeError, match="part 4 was given up: its process died 9 times"):
        Ledger(out, 4)


@pytest.mark.fault(95)
def test_a_part_that_died_is_done_again_with_the_same_rows(job, tmp_path):
    work = job()
    work.missing_parts()
    held = work.classifier()
    work.run_part(0, held)
    before = rows(tmp_path / "out")
    for _ in range(2):
        Ledger(work.output, 0).save(2)
    work.run_part(0, held)
    after = rows(tmp_path / "out")
    assert after["error"][2] == "the process died on this image"
    for at in (0, 1, 3, 4):
        assert after["labels"][at] == before["labels"][at]
        assert after["error"][at] == before["error"][at]


@pytest.mark.fault(95)
def test_a_process_that_dies_while_it_loads_the_network_has_tried_the_part(job, monkeypatch):
    work = job()
    work.missing_parts()
    monkeypatch.setattr(work, "classifier", lambda: sys.exit(9))
    for _ in range(UNNAMED + 1):
        with pytest.raises(SystemExit):
            work.run_part(0)
    with pytest.raises(RuntimeError, match="no image is to blame; is there too little memory"):
        work.run_part(0)


def test_part_files_have_one_schema(job, tmp_path):
    source = tmp_path / "in"
    write_images(source, 1, z=b"")
    do(job(source, part_size=1))
    good, bad = (read_table(path) for path in sorted((tmp_path / "out").glob("part-*")))
    assert good.schema == bad.schema
    assert bad["labels"].null_count == 1


def test_the_listing_is_sorted_whatever_the_order_on_the_disk(folder):
    table, passed = list_input(Place(folder), ("image", "path"), None)
    assert table["id"].to_pylist() == ids_in(folder)
    assert passed == 2


@pytest.mark.fault(94)
@pytest.mark.slow
def test_a_whole_job_in_an_object_store(job, folder, tmp_path):
    """S3's protocol, spoken by moto on this machine."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        where = f"?scheme=http&endpoint_override={host}:{port}&allow_bucket_creation=true"
        source, out = (f"s3://key:secret@bucket/{name}{where}" for name in ("in", "out"))
        system, path = Place(source).opened
        system.create_dir("bucket")
        for name in ids_in(folder):
            with system.open_output_stream(f"{path}/{name}") as stream:
                stream.write((folder / name).read_bytes())
        work = job(source, out)
        work.run_part(work.missing_parts()[1])
        assert (again := job(source, out, workers=1)).missing_parts() == [0, 2, 3, 4]
        report = again.run()
        assert (report.rows, report.parts_done) == (COUNT, 4)
        copy_files(out, str(tmp_path / "copy"))
        assert "secret" not in (tmp_path / "copy/_fastres.json").read_text()
    finally:
        server.stop()
    do(job())
    assert rows(tmp_path / "copy") == rows(tmp_path / "out")
    assert success(tmp_path / "copy")["errors"] == success(tmp_path / "out")["errors"]


def test_uris_are_shown_without_their_secrets():
    assert str(Place("s3://key:secret@bucket/in")) == "s3://bucket/in"
