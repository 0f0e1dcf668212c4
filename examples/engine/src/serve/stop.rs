//! Stop strings: looked for in the text as it comes, also where they span tokens.
//!
//! Invariant: what has been let through is never taken back. So the end of the text that may still become a stop string
//! is held until it is known.

/// Looks for stop strings in a text that comes in pieces.
#[derive(Clone, Debug)]
pub struct StopScanner {
    stops: Vec<String>,
    /// Keep the stop string in the text.
    include: bool,
    /// The end of the text that is not let through yet.
    held: String,
    stopped: bool,
}

/// What may be shown after a piece.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scanned {
    /// New text.
    pub text: String,
    /// A stop string was found; nothing follows.
    pub stopped: bool,
}

impl StopScanner {
    /// Looks for `stops`, which are not empty. `include` leaves the one found in the text.
    pub fn new(stops: Vec<String>, include: bool) -> Self {
        Self {
            stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(),
            include,
            held: String::new(),
            stopped: false,
        }
    }

    /// Takes the next piece. `may_stop` is false before `min_tokens`: then the piece is let through as it is.
    pub fn push(&mut self, piece: &str, may_stop: bool) -> Scanned {
        if self.stopped {
            return Scanned {
                text: String::new(),
                stopped: true,
            };
        }
        self.held.push_str(piece);
        if !may_stop || self.stops.is_empty() {
            return Scanned {
                text: std::mem::take(&mut self.held),
                stopped: false,
            };
        }
        // The earliest hit wins, as if the text had been read character by character: the one that ends first.
        let hit = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()).map(|at| (at, stop.len())))
            .min_by_key(|&(at, length)| (at + length, at));
        if let Some((at, length)) = hit {
            let end = if self.include { at + length } else { at };
            let mut text = std::mem::take(&mut self.held);
            text.truncate(end);
            self.stopped = true;
            return Scanned {
                text,
                stopped: true,
            };
        }
        let keep = self.undecided();
        let rest = self.held.split_off(self.held.len() - keep);
        Scanned {
            text: std::mem::replace(&mut self.held, rest),
            stopped: false,
        }
    }

    /// The text has ended otherwise: what was held.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Whether text is held.
    pub fn is_holding(&self) -> bool {
        !self.held.is_empty()
    }

    /// Bytes at the end of the text that may be the beginning of a stop string.
    fn undecided(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        (1..longest)
            .rev()
            .filter(|&length| length <= self.held.len())
            .filter(|&length| self.held.is_char_boundary(self.held.len() - length))
            .find(|&length| {
                let end = &self.held[self.held.len() - length..];
                self.stops.iter().any(|stop| stop.starts_with(end))
            })
            .unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], include: bool, pieces: &[&str]) -> (String, bool) {
        let stops = stops.iter().map(|&stop| stop.to_owned()).collect();
        let mut scanner = StopScanner::new(stops, include);
        let mut text = String::new();
        for piece in pieces {
            let scanned = scanner.push(piece, true);
            text.push_str(&scanned.text);
            if scanned.stopped {
                return (text, true);
            }
        }
        text.push_str(&scanner.finish());
        (text, false)
    }

    #[test]
    fn a_stop_string_across_pieces_is_found() {
        let pieces = ["one tw", "o\n", "\nthree"];
        assert_eq!(run(&["\n\n"], false, &pieces), ("one two".into(), true));
        assert_eq!(run(&["\n\n"], true, &pieces), ("one two\n\n".into(), true));
    }

    #[test]
    fn what_only_looked_like_one_is_shown() {
        assert_eq!(
            run(&["STOP"], false, &["ST", "O", "RE"]),
            ("STORE".into(), false)
        );
        assert_eq!(run(&["STOP"], false, &["STO"]), ("STO".into(), false));
    }

    #[test]
    fn the_one_that_ends_first_wins() {
        assert_eq!(run(&["cde", "b"], false, &["abcdef"]), ("a".into(), true));
        // "abcd" begins first, "c" ends first.
        assert_eq!(run(&["abcd", "c"], false, &["abcd"]), ("ab".into(), true));
    }

    #[test]
    fn nothing_stops_before_its_time() {
        let mut scanner = StopScanner::new(vec!["a".into()], false);
        assert_eq!(scanner.push("a", false).text, "a");
        assert!(scanner.push("xa", true).stopped);
        assert_eq!(scanner.push("more", true).text, "");
    }

    #[test]
    fn characters_are_not_cut() {
        assert_eq!(
            run(&["é!"], false, &["caf", "é", "é!"]),
            ("café".into(), true)
        );
    }

    proptest! {
        /// However a text is cut into pieces, the result is that of the whole.
        #[test]
        fn pieces_do_not_matter(
            text in "[abé]{0,24}",
            stops in proptest::collection::vec("[abé]{1,4}", 0..3),
            cuts in proptest::collection::vec(0_usize..25, 0..6),
            include: bool,
        ) {
            let chars: Vec<char> = text.chars().collect();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(chars.len())).collect();
            cuts.extend([0, chars.len()]);
            cuts.sort_unstable();
            let pieces: Vec<String> =
                cuts.windows(2).map(|pair| chars[pair[0]..pair[1]].iter().collect()).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let letters: Vec<String> = chars.iter().map(char::to_string).collect();
            let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            prop_assert_eq!(run(&stops, include, &pieces), run(&stops, include, &letters));
        }
    }
}
