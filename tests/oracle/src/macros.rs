//! Macros that list what to compare.

/// Compares the size, the alignment and, for each field, the offset and size of a struct or union of ours with
/// theirs. `fields` must name every field of ours, or it does not compile. A field that they call differently is
/// `ours = theirs`. `nested` lists paths into unions and inner structs.
#[macro_export]
macro_rules! layout {
    (
        $report:ident, $ours:ty = $theirs:ty,
        { $($field:ident $(= $other:ident)?),* $(,)? }
        $(nested { $($($path:ident).+ = $($opath:ident).+),* $(,)? })?
    ) => {{
        // Every field of ours is listed: a struct pattern without `..` is exhaustive.
        #[allow(unused)]
        fn exhaustive(value: &$ours) {
            type Ours = $ours;
            let Ours { $($field: _),* } = value;
        }
        $crate::layout!(@whole $report, $ours, $theirs);
        $($crate::layout!(@one $report, $ours, $theirs, $field, $field $(= $other)?);)*
        $($($crate::layout!(@field $report, $ours, $theirs, [$($path).+], [$($opath).+]);)*)?
    }};
    // A struct that later releases append to, and of which callers pass the size they know: ours may be shorter.
    ($report:ident, prefix $ours:ty = $theirs:ty, { $($field:ident),* $(,)? }) => {{
        #[allow(unused)]
        fn exhaustive(value: &$ours) {
            type Ours = $ours;
            let Ours { $($field: _),* } = value;
        }
        $report.compare(
            concat!("not longer than ", stringify!($theirs)), size_of::<$ours>() <= size_of::<$theirs>(), true);
        $report.compare(
            concat!("alignment of ", stringify!($theirs)), align_of::<$ours>(), align_of::<$theirs>());
        $($crate::layout!(@field $report, $ours, $theirs, [$field], [$field]);)*
    }};
    // Unions cannot be matched exhaustively; all variants start at 0, so a forgotten one can only change the size.
    ($report:ident, union $ours:ty = $theirs:ty, { $($field:ident $(= $other:ident)?),* $(,)? }) => {{
        $crate::layout!(@whole $report, $ours, $theirs);
        $($crate::layout!(@one $report, $ours, $theirs, $field, $field $(= $other)?);)*
    }};
    (@whole $report:ident, $ours:ty, $theirs:ty) => {
        $report.compare(
            concat!("size of ", stringify!($theirs)), size_of::<$ours>(), size_of::<$theirs>());
        $report.compare(
            concat!("alignment of ", stringify!($theirs)), align_of::<$ours>(), align_of::<$theirs>());
    };
    (@one $report:ident, $ours:ty, $theirs:ty, $field:ident, $same:ident = $other:ident) => {
        $crate::layout!(@field $report, $ours, $theirs, [$field], [$other])
    };
    (@one $report:ident, $ours:ty, $theirs:ty, $field:ident, $same:ident) => {
        $crate::layout!(@field $report, $ours, $theirs, [$field], [$field])
    };
    (@field $report:ident, $ours:ty, $theirs:ty, [$($path:ident).+], [$($opath:ident).+]) => {{
        let what = concat!(stringify!($theirs), ".", stringify!($($opath).+));
        $report.compare(
            format_args!("offset of {what}"),
            ::std::mem::offset_of!($ours, $($path).+),
            ::std::mem::offset_of!($theirs, $($opath).+),
        );
        // SAFETY: never called; only the types of the pointers are used.
        let ours = $crate::size_behind(|p: *const $ours| unsafe { &raw const (*p).$($path).+ });
        // SAFETY: as above.
        let theirs = $crate::size_behind(|p: *const $theirs| unsafe { &raw const (*p).$($opath).+ });
        $report.compare(format_args!("size of {what}"), ours, theirs);
    }};
}

/// Lists constants as `(name, value)`: plain ones, those in a module, the variants of a bitfield type, or of an enum.
#[macro_export]
macro_rules! constants {
    ($list:ident, $base:ident :: { $($name:ident),* $(,)? }) => {
        $list.extend([$((stringify!($name), $base::$name as i128)),*]);
    };
    ($list:ident, $base:ident :: $module:ident :: { $($name:ident),* $(,)? }) => {
        $list.extend([$((stringify!($name), $base::$module::$name as i128)),*]);
    };
    ($list:ident, bits $base:ident :: $module:ident :: { $($name:ident),* $(,)? }) => {
        $list.extend([$((stringify!($name), $base::$module::$name.0 as i128)),*]);
    };
}
