"""How every rule is asked: for each module of `passes.axes.rules` a module of samples."""

from tests.laws.samples.indexing import INDEXING
from tests.laws.samples.pointwise import FAMILIES, POINTWISE
from tests.laws.samples.products import PRODUCTS
from tests.laws.samples.sample import Sample
from tests.laws.samples.spatial import SPATIAL
from tests.laws.samples.sums import ALONG, NORMS, REDUCTIONS
from tests.laws.samples.views import VIEWS

__all__ = ["SAMPLES", "Sample"]

SAMPLES = (*FAMILIES, *POINTWISE, *REDUCTIONS, *ALONG, *NORMS, *PRODUCTS, *SPATIAL, *INDEXING, *VIEWS)
