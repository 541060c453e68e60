import pytest

from timm_convmix.errors import StageError
from timm_convmix.stages import choose_stages, read_feature_info, take_indices


@pytest.mark.parametrize(
    ("count", "stages", "chosen"),
    [
        (2, None, (0,)),
        (3, None, (0, 1)),
        (4, None, (0, 1, 2)),
        (5, None, (1, 2, 3)),
        (6, None, (2, 3, 4)),
        (5, (-2,), (3,)),
        (5, (4,), (4,)),
        (5, [3, 0], (0, 3)),
    ],
)
def test_choice_is_by_position(count, stages, chosen):
    assert choose_stages(count, stages) == chosen


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((5,), r"stages=\(5,\): 5 out of range; resnet18 has stages 0 to 4, or -5 to -1 from the end"),
        ((-6, 1), r"-6 out of range; resnet18 has stages 0 to 4"),
        ((1, -4), r"names a stage of resnet18 twice"),
        ((), r"taps nothing of resnet18; for the plain backbone use mixer='none'"),
        ((1.0,), r"must hold integers only; resnet18 has stages 0 to 4"),
        ((True,), r"must hold integers only"),
        ("12", r"stages='12' is not a sequence of integers; resnet18 has stages 0 to 4"),
        (3, r"stages=3 is not a sequence of integers"),
    ],
)
def test_bad_stages_are_refused_with_the_range(stages, message):
    with pytest.raises(StageError, match=message):
        choose_stages(5, stages, name="resnet18")


@pytest.mark.parametrize("info", [None, [], [dict(num_chs=8, reduction=2, module="stem")]])
def test_too_few_stages_are_refused_by_name(info):
    with pytest.raises(
        StageError, match=r"my_net has [01] stage\(s\) in its feature_info, and mixing needs at least 2"
    ):
        read_feature_info(info, name="my_net")


def test_indices_are_resolved_as_timm_does():
    assert take_indices(5, None, name="net") == [0, 1, 2, 3, 4]
    assert take_indices(5, 2, name="net") == [3, 4]
    assert take_indices(5, (-1, 0, 4), name="net") == [0, 4]
    with pytest.raises(StageError, match=r"out_indices=\(\) asks for no stage of net, which has 5"):
        take_indices(5, (), name="net")
    with pytest.raises(StageError, match=r"out_indices=6 asks for the last 6 stages of net, which has 5"):
        take_indices(5, 6, name="net")
    with pytest.raises(StageError, match=r"out_indices=\(7,\): 7 out of range; net has stages 0 to 4"):
        take_indices(5, (7,), name="net")
