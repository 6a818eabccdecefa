"""The command that classifies more images than one process should: batch."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from .console import (
    ERR,
    OUT,
    AsJson,
    Checkpoint,
    DeviceName,
    Labels,
    Published,
    Top,
    following,
    print_json,
    table,
)


def batch(
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="A folder, a .txt list, .tar or .parquet files (a pattern such as 'in/*.tar' "
            "too); a path, or a URI such as s3://bucket/folder.",
        ),
    ],
    output: Annotated[
        str, typer.Argument(metavar="OUTPUT", help="A folder for the Parquet files of this job.")
    ],
    model: Annotated[
        str,
        typer.Option(help="A network, a fused .safetensors file, or the folder of a training run."),
    ] = "resnet50",
    weights: Published = "DEFAULT",
    checkpoint: Checkpoint = None,
    labels: Labels = None,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, float16 or bfloat16; auto is bfloat16 on a GPU.")
    ] = "auto",
    device: DeviceName = "auto",
    top: Top = 5,
    embeddings: Annotated[
        str | None, typer.Option(help="Features too: avgpool, or layer4, which is large.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="auto, local or ray; auto is ray where RAY_ADDRESS is set.")
    ] = "auto",
    workers: Annotated[
        int | None, typer.Option(min=1, help="By default one to each core, or to each GPU.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="By default 8 on a CPU, 64 on a GPU.")
    ] = None,
    part_size: Annotated[int, typer.Option(min=1, help="Images of an output file.")] = 512,
    decode_threads: Annotated[
        int | None, typer.Option(min=1, help="Of a worker; by default its share of the cores.")
    ] = None,
    image_column: Annotated[str, typer.Option(help="Of Parquet: bytes or paths.")] = "image",
    id_column: Annotated[str, typer.Option(help="Of Parquet: what names an image.")] = "path",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many.")] = None,
    fast_decode: Annotated[
        bool, typer.Option("--fast-decode", help="Decode large JPEGs at reduced size.")
    ] = False,
    max_errors: Annotated[
        float, typer.Option(min=0, max=1, help="Exit with 1 beyond this share of error rows.")
    ] = 1.0,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Do parts that hold errors again.")
    ] = False,
    shared_fs: Annotated[
        bool, typer.Option("--shared-fs", help="Local paths are the same on all machines.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Classify folders, lists, tar or Parquet files of images into a folder of Parquet files.

    The same command again does what is missing. RAY_ADDRESS makes it a job of that cluster.
    """
    from ..batch import BatchJob

    job = BatchJob(
        source,
        output,
        engine=engine,
        workers=workers,
        part_size=part_size,
        limit=limit,
        image_column=image_column,
        id_column=id_column,
        retry_errors=retry_errors,
        shared_fs=shared_fs,
        model=model,
        weights=weights,
        checkpoint=checkpoint,
        labels=labels,
        dtype=dtype,
        device=device,
        top=top,
        embeddings=embeddings,
        batch_size=batch_size,
        decode_threads=decode_threads,
        fast_decode=fast_decode,
    )
    with redirect_stdout(sys.stderr), following() as follow:  # Ray tells of deaths on stdout
        report = job.run(follow(f"{source}, parts"))
    too_many = report.error_rate() > max_errors
    if as_json:
        print_json(report.to_dict())
        return int(too_many)
    speed = f" in {report.seconds:.0f} s" if report.parts_done else ""
    OUT.print(
        f"{report.rows:,} rows in {report.parts:,} parts, {report.parts_done:,} of them done"
        f"{speed}: {job.output}",
        markup=False,
    )
    for count, text in (
        (report.duplicate_ids, "rows have an id that others have too"),
        (report.passed_over, "files were passed over: their names are of no kind that is read"),
    ):
        if count:
            ERR.print(f"note: {count:,} {text}", markup=False)
    if report.errors:
        OUT.print(table(("errors", ""), [(why, f"{n:,}") for why, n in report.errors.items()]))
    if too_many:
        ERR.print(f"{report.error_rate():.1%} of the rows are errors", markup=False)
    return int(too_many)
