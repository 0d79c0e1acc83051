"""Can a posterior of all weights be acted on at the precision of its evidence, where images are few?

Command    python -m training.study --config configs/study_digits_weights.py \
           --workdir checkpoints/study_digits_weights --resume
Data       digits (embedded): 100 and 300 training images, clean and with 20 % wrong labels; 180 validation and 360 test
           images, 10 classes; 5 shifts of 200 test images at 5 severities; the test images inverted, and noise
Hardware   2 CPU cores, no GPU, under 4 GB of memory
Time       about an hour and a half on one core: a cell takes two to three minutes with 100 images, and five to eight
           with 300, six networks and three posteriors
Expected   The table of docs/results.md: with 100 images MAP .61, Laplace by the evidence 1.92, the variational
           posterior by its bound .69
Methods    MAP by AdamW, alone and with a temperature from folds of the training images, from one share of them, and
           from validation images; the Lanczos posterior of all weights, Laplace and variational, and variational with
           batch normalisation folded into kernels and a g-prior. The evidence, or its bound, chooses the prior
           precision.
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
        Posterior("lanczos", "laplace"),
        Posterior("lanczos", "variational"),
        Posterior("lanczos", "variational", prior="g", folded=True),
    ),
    measures=Measures(foreign=("inverted", "noise"), max_iterations=20),
    shown=("adamw.map", "adamw.map-t-split", "adamw.lanczos-laplace", "adamw.lanczos-variational"),
)
