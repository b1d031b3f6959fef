//! The namespaces that this node knows.
//!
//! A cache of replicated data: it may be behind, but never shows what was not committed. Whoever
//! finds a name missing asks the catalog's shard before answering that it does not exist.

use std::{collections::BTreeMap, sync::Arc};

use tokio::sync::watch;
use tombolo_core::{NamespaceId, namespace::Namespace};

/// One version of the catalog.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespaces {
    by_name: BTreeMap<String, Arc<Namespace>>,
    by_id: BTreeMap<NamespaceId, Arc<Namespace>>,
}

impl Namespaces {
    /// A catalog of these namespaces and the one that always exists.
    pub fn new(stored: impl IntoIterator<Item = Namespace>) -> Self {
        let mut namespaces = Self::default();
        for namespace in std::iter::once(Namespace::default_namespace()).chain(stored) {
            let namespace = Arc::new(namespace);
            namespaces.by_id.insert(namespace.id, Arc::clone(&namespace));
            namespaces.by_name.insert(namespace.name.clone(), namespace);
        }
        namespaces
    }

    /// The namespace with this name.
    pub fn named(&self, name: &str) -> Option<&Arc<Namespace>> {
        self.by_name.get(name)
    }

    /// The namespace with this number.
    pub fn with_id(&self, id: NamespaceId) -> Option<&Arc<Namespace>> {
        self.by_id.get(&id)
    }

    /// All namespaces, in order of their names.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Namespace>> {
        self.by_name.values()
    }
}

/// The catalog as this node sees it now. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Catalog {
    current: watch::Sender<Arc<Namespaces>>,
}

impl Default for Catalog {
    fn default() -> Self {
        let (current, _) = watch::channel(Arc::new(Namespaces::new([])));
        Self { current }
    }
}

impl Catalog {
    /// The present version.
    pub fn current(&self) -> Arc<Namespaces> {
        Arc::clone(&self.current.borrow())
    }

    /// Tells of every new version.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Namespaces>> {
        self.current.subscribe()
    }

    /// Publishes a version, if it differs.
    pub fn publish(&self, namespaces: Namespaces) {
        self.current.send_if_modified(|current| {
            let differs = **current != namespaces;
            if differs {
                *current = Arc::new(namespaces);
            }
            differs
        });
    }
}

#[cfg(test)]
mod tests {
    use tombolo_core::{HybridTime, Rule};

    use super::*;

    #[test]
    fn default_namespace_is_always_there_and_subscribers_hear_of_changes_only() {
        let catalog = Catalog::default();
        let mut versions = catalog.subscribe();
        assert_eq!(catalog.current().named("default").unwrap().rule, Rule::Lww);

        catalog.publish(Namespaces::new([]));
        assert!(!versions.has_changed().unwrap());
        let carts = Namespace {
            id: NamespaceId(16),
            name: "carts".to_owned(),
            rule: Rule::Siblings,
            created: HybridTime::ZERO,
            hold_ms: None,
        };
        catalog.publish(Namespaces::new([carts]));
        assert!(versions.has_changed().unwrap());
        let names: Vec<_> =
            versions.borrow_and_update().iter().map(|held| held.name.clone()).collect();
        assert_eq!(names, ["carts", "default"]);
    }
}
