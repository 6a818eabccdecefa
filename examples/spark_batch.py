"""A batch job of fastres on a Spark cluster, its parts given to mapInPandas (not run here).

spark-submit examples/spark_batch.py s3://bucket/in s3://bucket/out resnet50.safetensors
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from fastres.batch import BatchJob, run_part

ARGUMENTS = {"part_size": 512, "dtype": "float32", "device": "cpu", "threads": 1}


def main(source: str, output: str, model: str) -> None:
    from pyspark.sql import SparkSession

    spark = SparkSession.builder.getOrCreate()
    options = {"input": source, "output": output, "model": model, "engine": "local", **ARGUMENTS}

    def work(batches: Iterator[Any]) -> Iterator[Any]:
        job = BatchJob(**options)
        classifier = job.classifier()
        for batch in batches:
            for index in batch["part"]:
                run_part(job, int(index), classifier)
            yield batch

    job = BatchJob(**options)
    todo = job.missing_parts()
    if todo:
        parts = spark.createDataFrame([(index,) for index in todo], "part long")
        parts.repartition(len(todo)).mapInPandas(work, "part long").count()
    print(job.finish(len(todo)))


if __name__ == "__main__":
    main(*sys.argv[1:4])
