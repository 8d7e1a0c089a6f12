"""Room `codec`: bytes alone: grids, tables, entropy coders, the streams of a file (FORMAT.md); no model runs here."""
