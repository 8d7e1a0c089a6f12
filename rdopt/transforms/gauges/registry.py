"""All symmetries that rdopt knows: a new gauge is a file beside this one with its `Site`, and an entry of SITES.

What training is asked for by name is declared in `config.schema.SiteName` too.
"""

from collections.abc import Sequence

from rdopt.checkpoint.families import Architecture
from rdopt.transforms.gauges.channels import Channels
from rdopt.transforms.gauges.heads import Heads
from rdopt.transforms.gauges.hidden import Hidden
from rdopt.transforms.gauges.norm import Norm
from rdopt.transforms.gauges.query import Query
from rdopt.transforms.gauges.residual import Residual
from rdopt.transforms.gauges.site import Site
from rdopt.transforms.gauges.stretch import StretchedValue
from rdopt.transforms.gauges.value import Value

# In the order in which factors of one gauge are learned on each other and in which records are written.
SITES: tuple[Site, ...] = (
    Residual(), Value(), StretchedValue(), Norm(), Hidden(), Query(), Channels(), Heads()
)
# The sites whose maps a gauge is told by, by its field; the others are further factors of it.
OWNERS: dict[str, Site] = {site.field: site for site in SITES if site.name == site.field}


def changed_sides(
    names: Sequence[str], arch: Architecture, tied: bool = False
) -> tuple[frozenset[str], frozenset[str]]:
    """What changes in training at some sites, those with bases to start from included.

    Args:
        names: the sites.
        arch: of the network.
        tied: whether no basis parts embedding and head.

    Returns:
        the matrices whose outputs change, and the groups of matrices whose input does.
    """
    based = [site for site in SITES if site.identity(arch) is not None and not (tied and site.unties)]
    active = [site for site in SITES if site.name in names or site in based]
    outputs, inputs = (site.outputs_changed for site in active), (site.inputs_changed for site in active)
    return frozenset().union(*outputs), frozenset().union(*inputs)
