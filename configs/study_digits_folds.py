"""placeholder"""
from training.config import Config, Curvature, Data, Evaluation, Model, Optimizer, Prior
from training.study.config import Measures, Posterior, Regime, Study, Training

FEW = {"data.train_examples": 100, "optimizer.epochs": 120, "optimizer.polish_epochs": 240}
SOME = {"data.train_examples": 300, "optimizer.epochs": 60, "optimizer.polish_epochs": 120}
WRONG = {"data.wrong_labels": 0.2}

study = Study(
    config=Config(
        data=Data(name="digits"),
        model=Model(variant="digits"),
        optimizer=Optimizer(learning_rate=3e-3, batch_size=32, polish_learning_rate=1e-2),
        prior=Prior(precision=0.1),
        curvature=Curvature(num_probes=32, max_vectors=384, microbatch=64),
        evaluation=Evaluation(grid_size=17, grid_low=1e-1, grid_high=1e7),
    ),
    regimes=(
        Regime("clean_100", FEW),
        Regime("wrong_100", FEW | WRONG),
        Regime("clean_300", SOME),
        Regime("wrong_300", SOME | WRONG),
    ),
    seeds=(0, 1, 2, 3, 4),
    trainings=(Training("adamw", weight_decay=0.5),),
    posteriors=(
        Posterior("lanczos", "laplace", chosen_by="folds"),
        Posterior("lanczos", "laplace"),
        Posterior("lanczos", "variational"),
    ),
    measures=Measures(foreign=("inverted", "noise"), max_iterations=20),
    shown=("adamw.map", "adamw.map-t-split", "adamw.lanczos-laplace-by-folds", "adamw.lanczos-variational"),
)
