"""Does a posterior chosen by the evidence alone predict better than MAP with a temperature, where images are few?

Command    python -m training.study --config configs/study_digits_short.py --workdir checkpoints/study_digits_short \
           --resume
Data       digits (embedded): 100, 300 and 1,257 training images, clean and with 20 % wrong labels; 180 validation and
           360 test images, 10 classes; 5 shifts of 200 test images at 5 severities; the test images inverted, and noise
Hardware   2 CPU cores, no GPU, under 4 GB of memory
Time       100 minutes on one core: a cell, six networks and two posteriors of the last layer, takes about one minute
           with 100 or 300 images, and eight with 1,257
Expected   The table of docs/results.md: with 100 images MAP .61, with a temperature from folds .56, the variational
           posterior by its bound alone .54
Methods    MAP by AdamW, alone and with a temperature from folds of the training images, from one share of them, and
           from validation images; a full posterior of the last layer, Laplace and variational, whose prior the
           evidence, or its bound, chooses, and beside it the validation NLL.
"""

from training.config import Config, Curvature, Data, Evaluation, Model, Optimizer, Prior
from training.study.config import Measures, Posterior, Regime, Study, Training

FEW = {"data.train_examples": 100, "optimizer.epochs": 120, "optimizer.polish_epochs": 240}
SOME = {"data.train_examples": 300, "optimizer.epochs": 60, "optimizer.polish_epochs": 120}
WRONG = {"data.wrong_labels": 0.2}

study = Study(
    config=Config(
        data=Data(name="digits"),
        model=Model(variant="digits"),
        optimizer=Optimizer(learning_rate=3e-3, batch_size=32, epochs=40, polish_epochs=45, polish_learning_rate=1e-2),
        prior=Prior(precision=0.1),
        curvature=Curvature(num_probes=32, max_vectors=384, microbatch=64),
        evaluation=Evaluation(grid_size=15, grid_low=1e-2, grid_high=1e5),
    ),
    regimes=(
        Regime("clean_100", FEW),
        Regime("wrong_100", FEW | WRONG),
        Regime("clean_300", SOME),
        Regime("wrong_300", SOME | WRONG),
        Regime("clean_1257"),
        Regime("wrong_1257", WRONG),
    ),
    seeds=(0, 1, 2, 3, 4),
    trainings=(Training("adamw", weight_decay=0.5),),
    posteriors=(
        Posterior("full", "laplace", weights="last_layer"),
        Posterior("full", "variational", weights="last_layer"),
    ),
    measures=Measures(foreign=("inverted", "noise"), max_iterations=20),
    shown=("adamw.map", "adamw.map-t-split", "adamw.last-layer-full-laplace", "adamw.last-layer-full-variational"),
)
