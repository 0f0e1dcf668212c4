//! Special tokens inside of text.

/// Cuts `text` at each of `specials`: what stands before, and which special follows (none at the end).
pub(super) fn split<'a>(
    mut text: &'a str,
    specials: &'a [&'a str],
) -> impl Iterator<Item = (&'a str, Option<usize>)> + 'a {
    let mut has_ended = false;
    std::iter::from_fn(move || {
        if has_ended {
            return None;
        }
        let found = specials
            .iter()
            .enumerate()
            .filter_map(|(index, special)| Some((text.find(special)?, index)))
            .min();
        let Some((at, index)) = found else {
            has_ended = true;
            return Some((text, None));
        };
        let before = &text[..at];
        text = &text[at + specials[index].len()..];
        Some((before, Some(index)))
    })
}
