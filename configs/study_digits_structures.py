"""Which structure of the covariance can be acted on at the precision of its evidence, where images are few?

Command    python -m training.study --config configs/study_digits_structures.py \
           --workdir checkpoints/study_digits_structures --resume
Data       digits (embedded): 100 training images, clean and with 20 % wrong labels; 180 validation and 360 test images,
           10 classes; 5 shifts of 200 test images at 5 severities; the test images inverted, and noise
Hardware   2 CPU cores, no GPU, under 4 GB of memory
Time       half an hour on one core: a cell takes two to five minutes, six networks and six posteriors
Expected   The table of docs/results.md: with 100 images MAP .61, Laplace posteriors of all weights 1.9 to 2.0,
           variational ones .69 to .71, of the last layer .55
Methods    MAP by AdamW, alone and with a temperature from folds of the training images, from one share of them, and
           from validation images; posteriors of all weights with the diagonal and with Kronecker factors, and of the
           last layer with Kronecker factors, each Laplace and variational; the evidence, or its bound, chooses their
           prior precision.
"""

from training.config import Config, Curvature, Data, Evaluation, Model, Optimizer, Prior
from training.study.config import Measures, Posterior, Regime, Study, Training

FEW = {"data.train_examples": 100, "optimizer.epochs": 120, "optimizer.polish_epochs": 240}
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
    ),
    seeds=(0, 1, 2, 3, 4),
    trainings=(Training("adamw", weight_decay=0.5),),
    posteriors=(
        Posterior("diag", "laplace"),
        Posterior("diag", "variational"),
        Posterior("kron", "laplace"),
        Posterior("kron", "variational"),
        Posterior("kron", "laplace", weights="last_layer"),
        Posterior("kron", "variational", weights="last_layer"),
    ),
    measures=Measures(foreign=("inverted", "noise"), max_iterations=40),
    shown=("adamw.map", "adamw.map-t-split", "adamw.kron-laplace", "adamw.kron-variational"),
)
