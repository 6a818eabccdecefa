"""Batch inference. classifier holds a worker's network, parts what a job's files are, job the
``BatchJob`` that lists, resumes and counts, engines what runs the workers: processes or Ray.
"""

from .classifier import Classifier as Classifier
from .classifier import Row as Row
