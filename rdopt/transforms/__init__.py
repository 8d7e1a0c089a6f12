"""Room `transforms`: orthogonal matrices, parametrised, trained, composed, recorded and rebuilt."""
