//! The list of all scenarios, and the filters of the command line.

use crate::scenario::{Definition, Scenario};
use crate::{Error, Result};
use std::collections::BTreeSet;

/// A scenario beside its definition.
pub struct Entry {
    /// The definition, made once.
    pub definition: Definition,
    /// The scenario.
    pub scenario: Box<dyn Scenario>,
}

/// All scenarios, in the order in which they run and are reported.
pub struct Registry {
    entries: Vec<Entry>,
}

/// Which scenarios are meant; empty lists mean all.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Slugs.
    pub only: Vec<String>,
    /// Crates, with or without the prefix.
    pub krate: Vec<String>,
    /// Tags.
    pub tag: Vec<String>,
}

impl Registry {
    /// The scenarios of this build.
    ///
    /// # Errors
    /// [`Error::BadDefinition`] when a definition contradicts itself.
    pub fn builtin() -> Result<Self> {
        Self::new(crate::scenarios::all())
    }

    /// A registry of these scenarios.
    ///
    /// # Errors
    /// [`Error::BadDefinition`] when a definition contradicts itself or a slug occurs twice.
    pub fn new(scenarios: Vec<Box<dyn Scenario>>) -> Result<Self> {
        let mut entries: Vec<Entry> = Vec::new();
        for scenario in scenarios {
            let definition = scenario.definition();
            definition.validate()?;
            let pairs = scenario.trade_offs().iter().flat_map(|(a, b)| [a, b]);
            for name in pairs {
                if definition.metric(name).is_none() {
                    return Err(Error::BadDefinition {
                        slug: definition.slug.to_string(),
                        reason: format!("a trade-off names `{name}`, which is no metric"),
                    });
                }
            }
            if entries.iter().any(|e| e.definition.slug == definition.slug) {
                return Err(Error::BadDefinition {
                    slug: definition.slug.to_string(),
                    reason: "is registered twice".into(),
                });
            }
            entries.push(Entry {
                definition,
                scenario,
            });
        }
        Ok(Self { entries })
    }

    /// All entries.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The entry of this slug.
    ///
    /// # Errors
    /// [`Error::Unknown`] listing the slugs there are.
    pub fn get(&self, slug: &str) -> Result<&Entry> {
        self.entries
            .iter()
            .find(|e| e.definition.slug == slug)
            .ok_or_else(|| self.unknown("scenario", slug, |d| vec![d.slug.to_string()]))
    }

    /// The entries that a filter leaves, in registry order.
    ///
    /// # Errors
    /// [`Error::Unknown`] when a name in the filter is nowhere, listing those there are.
    pub fn select(&self, filter: &Filter) -> Result<Vec<&Entry>> {
        for slug in &filter.only {
            self.get(slug)?;
        }
        let bare = |name: &str| name.strip_prefix("thalweg-").unwrap_or(name).to_string();
        for krate in &filter.krate {
            if !self
                .entries
                .iter()
                .any(|e| e.definition.krate == bare(krate))
            {
                return Err(self.unknown("crate", krate, |d| vec![d.krate.to_string()]));
            }
        }
        for tag in &filter.tag {
            if !self
                .entries
                .iter()
                .any(|e| e.definition.tags.contains(&tag.as_str()))
            {
                let tags = |d: &Definition| d.tags.iter().map(ToString::to_string).collect();
                return Err(self.unknown("tag", tag, tags));
            }
        }
        let keep = |e: &&Entry| {
            let d = &e.definition;
            (filter.only.is_empty() || filter.only.iter().any(|s| s == d.slug))
                && (filter.krate.is_empty() || filter.krate.iter().any(|k| bare(k) == d.krate))
                && (filter.tag.is_empty() || filter.tag.iter().any(|t| d.tags.contains(&&**t)))
        };
        Ok(self.entries.iter().filter(keep).collect())
    }

    fn unknown(
        &self,
        kind: &'static str,
        name: &str,
        names: impl Fn(&Definition) -> Vec<String>,
    ) -> Error {
        let known: BTreeSet<String> = self
            .entries
            .iter()
            .flat_map(|e| names(&e.definition))
            .collect();
        Error::Unknown {
            kind,
            name: name.to_string(),
            known: known.into_iter().collect(),
        }
    }
}
