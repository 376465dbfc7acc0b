//! Why a command failed: what happened, to what, and what to do, in words for a person; and the exit code.

use std::fmt;

/// The result of a command or a part of one.
pub type Outcome<T> = Result<T, Failure>;

/// Exit code of a command that was used wrongly, as mount(8) defines it.
pub const EXIT_USAGE: u8 = 1;
/// Exit code of a mount that failed, as mount(8) defines it.
pub const EXIT_MOUNT: u8 = 32;

/// A failed command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What happened, to what, and what to do.
    pub message: String,
    /// The exit code.
    pub code: u8,
}

impl Failure {
    /// A failure with exit code 1.
    pub fn new(message: impl Into<String>) -> Self {
        Failure { message: message.into(), code: 1 }
    }

    /// The same with another exit code.
    #[must_use]
    pub fn code(mut self, code: u8) -> Self {
        self.code = code;
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// Says what was being done when an error came.
pub trait Context<T> {
    /// Turns an error into a failure: `what: error`.
    ///
    /// # Errors
    /// If this is one.
    fn context(self, what: impl FnOnce() -> String) -> Outcome<T>;
}

impl<T, E: fmt::Display> Context<T> for Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Outcome<T> {
        self.map_err(|e| Failure::new(format!("{}: {e}", what())))
    }
}
