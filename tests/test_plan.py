"""engine/plan.py: bootstraps where they are cheapest, and tables for every attention."""

from dataclasses import replace

from engine.plan import FUNCTIONS, GPT2, Shape, all_tokens, fewest_bootstraps, next_token, plan


def test_bootstraps_are_placed_where_the_fewest_ciphertexts_are_alive():
    assert fewest_bootstraps([5] * 11) == 0  # a fresh ciphertext has that many levels
    assert fewest_bootstraps([5] * 12) == 5
    assert fewest_bootstraps([5, 5, 5, 2, *[5] * 10]) == 2


def test_gpt2_needs_one_bootstrap_of_24_ciphertexts_between_blocks():
    cost = all_tokens(GPT2, "GKpoly-4")
    assert cost.depth == 12 * 10 and cost.bootstraps == 11 * 24


def test_n_costs_depth_and_squarings_only():
    few, many = all_tokens(GPT2, "GKpoly-2"), all_tokens(GPT2, "GKpoly-4")
    assert (few.plain_products, few.rotations) == (many.plain_products, many.rotations)
    assert many.depth == few.depth + 12 * 2


def test_quartic_costs_one_level_and_one_square_of_each_hidden_ciphertext():
    for shape, hidden, count in (
        (Shape(1, 1, 128, 64), 1, next_token),
        (GPT2, 12 * 4 * 24, all_tokens),
    ):
        quad, quartic = (count(replace(shape, mlp_act=act), "GK") for act in ("quad", "quartic"))
        assert quartic.depth == quad.depth + shape.n_layer
        assert quartic.ciphertext_products == quad.ciphertext_products + hidden
        assert quartic.plain_products == quad.plain_products


def test_every_attention_is_in_the_tables_from_the_model_to_gpt2():
    text = plan(Shape(1, 1, 128, 64))
    for name in FUNCTIONS:
        assert text.split().count(name) >= 4
    assert "L4 H1 C128 T64" in text and "L12 H12 C768 T1024" in text and "Assumptions" in text
