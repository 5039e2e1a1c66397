//! The page in English.

use super::texts::Texts;

pub(super) static TEXTS: Texts = Texts {
    title: "visitas",
    your_visit: "is the number of your visit. It is committed and on disk.",
    not_recorded: "Your visit was not recorded.",
    other_language: "português",
};
