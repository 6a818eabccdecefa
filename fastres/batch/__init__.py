"""Batch inference. classifier holds a worker's network, network finds it by name, file or run;
parts is about a job's files, engines about its workers, and job joins them in ``BatchJob``.
"""

from .classifier import Classifier as Classifier
from .classifier import Row as Row
from .job import BatchJob as BatchJob
from .job import Report as Report
from .job import run_part as run_part
