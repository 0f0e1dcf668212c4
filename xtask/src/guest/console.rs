//! What a guest reports over its second serial port: the program's output, and our markers between it. Pure.
//!
//! A marker is `@@kvpush-guest NONCE WORD VALUE@@`. The nonce is drawn for each run, so nothing a program prints (an old
//! log, this file) passes for a marker. Markers are found anywhere in a line, because a program may end without a
//! newline and the kernel may write between.

/// What a guest told us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Marker {
    /// Devices are there and the program starts now.
    Ready,
    /// The program ended with this status.
    Exit(i32),
    /// The guest could not get so far as to run the program.
    Broken(String),
}

/// A line of console, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Line {
    /// What is not a marker; `None` when there is nothing else in the line.
    pub(crate) text: Option<String>,
    pub(crate) marker: Option<Marker>,
}

/// Takes a line (with or without its line end) apart.
pub(crate) fn parse_line(line: &str, nonce: &str) -> Line {
    let line = line.trim_end_matches(['\r', '\n']);
    let plain = || Line {
        text: Some(line.to_owned()),
        marker: None,
    };

    let opening = format!("@@kvpush-guest {nonce} ");
    let Some((before, rest)) = line.split_once(&opening) else {
        return plain();
    };
    let Some((body, after)) = rest.split_once("@@") else {
        return plain();
    };
    let marker = match body.split_once(' ').unwrap_or((body, "")) {
        ("ready", _) => Marker::Ready,
        ("exit", status) => match status.trim().parse() {
            Ok(status) => Marker::Exit(status),
            Err(_) => Marker::Broken(format!("unreadable exit status {status:?}")),
        },
        ("broken", why) => Marker::Broken(why.to_owned()),
        _ => return plain(),
    };
    let text = format!("{before}{after}");
    Line {
        text: (!text.trim().is_empty()).then_some(text),
        marker: Some(marker),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> (Option<String>, Option<Marker>) {
        let line = parse_line(line, "n0nce");
        (line.text, line.marker)
    }

    #[test]
    fn markers_are_found_alone_and_within_noise() {
        assert_eq!(
            parse("@@kvpush-guest n0nce ready @@\r\n"),
            (None, Some(Marker::Ready))
        );
        assert_eq!(
            parse("@@kvpush-guest n0nce exit 101@@"),
            (None, Some(Marker::Exit(101)))
        );
        let (text, marker) =
            parse("no newline here@@kvpush-guest n0nce exit 0@@[    7.1] link down\n");
        assert_eq!(text.as_deref(), Some("no newline here[    7.1] link down"));
        assert_eq!(marker, Some(Marker::Exit(0)));
        let broken = Marker::Broken("cannot mount out".into());
        assert_eq!(
            parse("@@kvpush-guest n0nce broken cannot mount out@@").1,
            Some(broken)
        );
    }

    #[test]
    fn foreign_truncated_and_unknown_markers_are_text() {
        for line in [
            "@@kvpush-guest other exit 0@@",
            "@@kvpush-guest n0nce exit 0",
            "@@kvpush-guest n0nce what 1@@",
            "x",
        ] {
            assert_eq!(parse(line), (Some(line.to_owned()), None));
        }
    }

    #[test]
    fn an_unreadable_status_is_never_success() {
        assert!(matches!(
            parse("@@kvpush-guest n0nce exit @@").1,
            Some(Marker::Broken(_))
        ));
        assert!(matches!(
            parse("@@kvpush-guest n0nce exit 99999999999@@").1,
            Some(Marker::Broken(_))
        ));
    }
}
