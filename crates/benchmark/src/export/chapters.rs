//! The report's pictures that chapters of the book show.

use crate::report::replace;
use crate::summary::Sheet;
use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// The folder of the pictures, in the documentation's.
pub const FOLDER: &str = "pictures";

/// A picture of a chapter: of the first seed of an arm's best setting, on embedded data.
#[derive(Debug, Clone, Copy)]
pub struct ChapterPicture {
    /// Its name in [`FOLDER`].
    pub file: &'static str,
    /// The scenario.
    pub slug: &'static str,
    /// The arm's name.
    pub arm: &'static str,
    /// The picture's caption.
    pub caption: &'static str,
}

/// All of them.
pub const PICTURES: [ChapterPicture; 3] = [
    ChapterPicture {
        file: "guidance-cfg.svg",
        slug: "gfcg",
        arm: "cfg",
        caption: "one class of a ring, over its density",
    },
    ChapterPicture {
        file: "guidance-gfcg.svg",
        slug: "gfcg",
        arm: "gfcg",
        caption: "one class of a ring, over its density",
    },
    ChapterPicture {
        file: "guidance-box.svg",
        slug: "flowchef",
        arm: "chef",
        caption: "box: digits, measurements, result",
    },
];

/// Writes those that these sheets have; gives their paths.
///
/// # Errors
/// [`Error::Io`]; [`Error::BadFile`] for a scenario that was run and has not made its picture.
pub fn write(sheets: &[Sheet], docs: &Path) -> Result<Vec<PathBuf>> {
    let mut written = Vec::new();
    for wanted in PICTURES {
        let mine =
            |s: &&Sheet| s.definition.slug == wanted.slug && s.data == s.definition.data.embedded;
        let Some(sheet) = sheets.iter().find(mine) else {
            continue;
        };
        let path = docs.join(FOLDER).join(wanted.file);
        let bytes = picture(sheet, &wanted).ok_or_else(|| Error::BadFile {
            path: path.display().to_string(),
            reason: format!(
                "{}'s arm {} has no picture {:?}",
                wanted.slug, wanted.arm, wanted.caption
            ),
        })?;
        replace(&path, bytes)?;
        written.push(path);
    }
    Ok(written)
}

fn picture<'a>(sheet: &'a Sheet, wanted: &ChapterPicture) -> Option<&'a [u8]> {
    let arms = sheet.table.arms();
    let arm = arms.iter().find(|a| a.arm.name == wanted.arm)?;
    let setting = &arm.best.as_ref()?.name;
    let seed = *sheet.table.seeds().first()?;
    let trial = sheet.table.trial(wanted.arm, setting, seed)?;
    let mut pictures = trial.outcome.pictures.iter();
    let found = pictures.find(|p| p.caption == wanted.caption)?;
    Some(&found.bytes)
}
