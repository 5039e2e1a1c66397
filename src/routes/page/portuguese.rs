//! The page in Portuguese.

use super::texts::Texts;

pub(super) static TEXTS: Texts = Texts {
    title: "visitas",
    your_visit: "é o número da sua visita. Ela está gravada em disco.",
    not_recorded: "Sua visita não foi registrada.",
    other_language: "English",
};
