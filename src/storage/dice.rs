//! Dice for tests: a small generator, so that a failing round can be repeated from its number.

/// The next number (splitmix64).
pub(crate) fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// True once in `n` times.
pub(crate) fn one_in(state: &mut u64, n: u64) -> bool {
    random(state).is_multiple_of(n)
}
