//! The page in English.

use super::Texts;

pub(super) const TEXTS: Texts = Texts {
    title: "visitas",
    your_visit: "is the number of your visit. It is committed and on disk.",
    not_recorded: "Your visit was not recorded.",
    other_language: "português",
};
