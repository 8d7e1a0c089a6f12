"""What the signal experiment can be told, checked as every configuration is."""

from dataclasses import dataclass, fields

from rdopt.config.check import Limits, checked

SAMPLES = 256  # of a signal, at the middles of equal cells of [0, 1)
HIDDEN_LAYERS = 3  # hidden layers of the MLP
SNR_LEVELS = (8.0, 12.0, 16.0, 20.0)  # dB at which bits are compared
SNR_AIMS = (-5.0, 3.0, 7.0, 11.0, 15.0, 19.0, 24.0)  # dB that the steps aim at, to first order
REFERENCE_DB = 20.0  # dB: the steps at which rotations are fitted and coordinates are described
_LIMITS = {
    "seeds": Limits(low=2, high=64),
    "seed": Limits(low=0, high=10**8),
    "steps": Limits(low=1, high=10**6),
    "width": Limits(low=2, high=256),
    "sinusoids": Limits(low=1, high=256),
    "cycles": Limits(above=1, high=64),
    "turn_steps": Limits(low=1, high=10**5),
}


@dataclass(frozen=True, kw_only=True)
class ToySettings:
    """The keys of the experiment.

    Attributes:
        seeds: independent signals and MLPs; the errors are standard errors over them.
        seed: the first of them; the others follow it.
        steps: of Adam on the MLP.
        width: units of every hidden layer.
        sinusoids: summed in a signal.
        cycles: highest frequency, in cycles over the domain.
        turn_steps: of Adam on the learned rotations.
    """

    seeds: int = 6
    seed: int = 0
    steps: int = 2000
    width: int = 48
    sinusoids: int = 8
    cycles: float = 8.0
    turn_steps: int = 100

    def __post_init__(self) -> None:
        for f in fields(self):
            value = checked(f"--{f.name.replace('_', '-')}", getattr(self, f.name), f.type, _LIMITS[f.name])
            object.__setattr__(self, f.name, value)

    @property
    def parameters(self) -> int:
        """Numbers in the MLP."""
        hidden = (HIDDEN_LAYERS - 1) * (self.width + 1) * self.width
        return 2 * self.width + hidden + self.width + 1


def toy_sizes(settings: ToySettings) -> str:
    """What the experiment would do, in two lines."""
    files = 7 * len(SNR_AIMS) * settings.seeds
    flops = 6 * SAMPLES * settings.parameters * settings.steps * settings.seeds
    return (
        f"{settings.seeds} signals of {settings.sinusoids} sinusoids up to {settings.cycles:g} cycles, {SAMPLES} "
        f"samples each; an MLP of {HIDDEN_LAYERS} hidden layers of {settings.width}, {settings.parameters} parameters, "
        f"{settings.steps} steps of Adam\n"
        f"about {flops / 1e9:.0f} GFLOP of training, {files} files coded; under 1 MiB of disk"
    )
