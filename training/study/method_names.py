"""The names of the methods without a posterior. Posteriors have names of their own: `Posterior.name`."""

MAP, MAP_PART = "map", "map-part"
MAP_T_SPLIT, MAP_T_PART, MAP_T_VALIDATION = "map-t-split", "map-t-part", "map-t-validation"
ENSEMBLE = "ensemble"

_LABELS = {
    MAP: "MAP",
    MAP_PART: "MAP of the first fold",
    MAP_T_SPLIT: "MAP + T (held-out folds)",
    MAP_T_PART: "MAP + T (first fold, its held-out share)",
    MAP_T_VALIDATION: "MAP + T (validation images)",
    ENSEMBLE: "ensemble",
}


def label(name: str) -> str:
    """Return what tables and figures call a method. A posterior has its name there."""
    return _LABELS.get(name, name)


def names_of(folds: int, ensemble: int) -> list[str]:
    """Return the names of those that a training has, with so many folds and members of an ensemble."""
    of_folds = [MAP_PART, MAP_T_PART, MAP_T_SPLIT] if folds else []
    return [MAP, MAP_T_VALIDATION, *of_folds, *([ENSEMBLE] if ensemble else [])]
