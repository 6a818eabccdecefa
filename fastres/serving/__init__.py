"""A network behind HTTP. predictor has images to labels, guard the limits of any ASGI application,
lit what LitServe lacks, serve the whole, page.html what a browser shows.
"""

from .guard import Guard as Guard
from .predictor import Predictor as Predictor
from .serve import api as api
from .serve import serve as serve
