"""The signal experiment: sums of sinusoids as Fourier coefficients and as a ReLU MLP, coded at equal distortion."""
