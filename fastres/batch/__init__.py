"""Batch inference: classifier holds a worker's network, network finds it by name, file or run."""

from .classifier import Classifier as Classifier
from .classifier import Row as Row
