"""The question of a view is found in its row, and its fused states stand there."""

import jax
import jax.numpy as jnp
import numpy as np

from tests import builders
from vlm_jax.models.questions import question_index
from vlm_jax.models.vlm import Vlm


def test_where_questions_stand() -> None:
    #                 bos I  I  q  q  q  a   bos I  I  q  q  q  .
    tokens = np.array([[1, 0, 0, 7, 8, 9, 8, 1, 0, 0, 7, 5, 3, 0]])
    segment = np.array([[1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0]])
    visual = np.array([[-1, 0, 1, -1, -1, -1, -1, -1, 2, 3, -1, -1, -1, -1]])
    question = np.array([[[1, 7, 8, 9, -1], [1, 6, 5, 3, -1], [1, 7, 8, -1, -1]]])  # 6: another form of 7
    expected = [[[-1, 3, 4, 5, -1], [-1, 10, 11, 12, -1], [-1] * 5]]  # the third view is not in the row
    np.testing.assert_array_equal(question_index(*map(jnp.asarray, (tokens, visual, segment, question)), 2), expected)
    question[0, 0, 2] = 4  # in no conversation
    found = question_index(*map(jnp.asarray, (tokens, visual, segment, question)), 2)
    assert (found[0, 0] == -1).all()


def test_fused_questions_replace_embeddings() -> None:
    """The answer then follows the image through the question too: with the image tokens hidden, it still does."""
    model = Vlm(builders.model("llava_mini", 4), builders.COMPUTE)
    params = jax.tree.map(jnp.asarray, builders.params(model))
    packed = builders.inputs(rows=2, questions=2, views=2)
    begin = np.full_like(packed.views.question[..., :1], 1)
    packed = packed._replace(
        views=packed.views._replace(question=np.concatenate([begin, packed.views.question], axis=-1))
    )
    packed = packed._replace(order=np.where(packed.visual >= 0, 1000, packed.order))  # so that no text sees the image
    hidden = jax.jit(lambda inputs: model.forward(params, inputs)[0])
    other = packed._replace(views=packed.views._replace(pixels=255 - packed.views.pixels))
    answer = packed.weight > 0
    assert np.abs(hidden(packed) - hidden(other))[answer].max() > 1e-3
    # A question that the row does not have is not merged, and then nothing of the image is left.
    lost = packed.views.question.copy()
    lost[..., 2] = 31 - lost[..., 2]
    one, two = (rows._replace(views=rows.views._replace(question=lost)) for rows in (packed, other))
    np.testing.assert_allclose(hidden(one)[answer], hidden(two)[answer], atol=1e-6)
