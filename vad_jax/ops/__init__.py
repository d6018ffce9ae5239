"""Pure functions: boxes, RoIAlign, matching, losses."""
