//! The shape of a C function: size of the result and of every argument.
//!
//! The two sides name different types, so signatures cannot be compared as types; a shape tells a missing argument,
//! swapped widths and a wrong result width, but not one pointer from another.

/// A C function pointer.
pub trait Shape {
    /// Size of the result, then of each argument, in bytes.
    const SHAPE: &'static [usize];

    /// The function's address.
    fn address(self) -> usize;
}

macro_rules! shape {
    ($($arg:ident)*) => {
        impl<R, $($arg),*> Shape for unsafe extern "C" fn($($arg),*) -> R {
            const SHAPE: &'static [usize] = &[size_of::<R>(), $(size_of::<$arg>()),*];

            fn address(self) -> usize {
                self as usize
            }
        }
    };
}

shape!();
shape!(A);
shape!(A B);
shape!(A B C);
shape!(A B C D);
shape!(A B C D E);
shape!(A B C D E F);

impl<F: Shape> Shape for Option<F> {
    const SHAPE: &'static [usize] = F::SHAPE;

    fn address(self) -> usize {
        self.map_or(0, F::address)
    }
}

/// The shape of `F`, as text.
#[must_use]
pub fn text<F: Shape>() -> String {
    let sizes: Vec<String> = F::SHAPE.iter().map(ToString::to_string).collect();
    let (result, arguments) = sizes
        .split_first()
        .expect("a shape has at least the result");
    format!("({}) -> {result}", arguments.join(", "))
}

/// The shape of the function pointer in the field that `project` points to, as text.
#[must_use]
pub fn behind<T, F: Shape>(_project: fn(*const T) -> *const F) -> String {
    text::<F>()
}

/// The shape and address of a function, given as a value.
#[must_use]
pub fn of<F: Shape>(function: F) -> (String, usize) {
    (text::<F>(), function.address())
}
