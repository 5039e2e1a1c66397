//! Reads the imports of the files in `src`, and refuses circles between files and between rooms.
//! `make map` prints the graph, with each room on a floor above every room that it imports.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// A module's path in the crate, such as `["store", "pool"]`. The crate's root is empty.
type Module = Vec<String>;

/// For each node, the nodes that it imports.
type Graph = BTreeMap<String, BTreeSet<String>>;

#[test]
fn imports_form_no_circle_between_files() {
    let graph = imports(|module| module.join("/"));
    assert_eq!(find_circle(&graph), None);
}

#[test]
fn imports_form_no_circle_between_rooms() {
    let graph = imports(room);
    assert_eq!(find_circle(&graph), None);
    println!("{}", map(&graph));
}

#[test]
fn find_circle_returns_its_nodes() {
    let arrows = [("a", "b"), ("b", "c"), ("c", "b"), ("a", "d")];
    let mut graph = Graph::new();
    for (from, to) in arrows {
        graph
            .entry(from.to_owned())
            .or_default()
            .insert(to.to_owned());
    }
    assert_eq!(find_circle(&graph).as_deref(), Some("b -> c -> b"));
}

#[test]
fn import_leads_to_the_file_that_its_path_names() {
    let known = BTreeSet::from(["store", "store/pool", "store/call"].map(module));
    let text = "use crate::store::Store;\nuse super::call::{Batch, observe};\nuse super::{Error, call};\n\
        // use crate::app;\nfn f() { crate::store::pool::keep(); }\n#[cfg(test)]\nmod tests { use crate::app::App; }\n";
    let found = imported_modules(text, &module("store/pool"), &known);
    assert_eq!(
        found
            .iter()
            .map(|module| module.join("/"))
            .collect::<Vec<_>>(),
        ["store", "store/call"]
    );
}

fn module(path: &str) -> Module {
    path.split('/').map(str::to_owned).collect()
}

/// A room is a file or a folder directly beneath `src`.
fn room(module: &Module) -> String {
    module.first().cloned().unwrap_or_default()
}

/// Builds the graph of imports; `name` maps a module to its node. Without the crate's root, which
/// only declares modules and exports the version.
fn imports(name: impl Fn(&Module) -> String) -> Graph {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let files = files(&root);
    let modules: BTreeMap<Module, PathBuf> = files
        .into_iter()
        .map(|file| {
            (
                module_of(file.strip_prefix(&root).expect("beneath src")),
                file,
            )
        })
        .filter(|(module, _)| !module.is_empty())
        .collect();
    let known = modules.keys().cloned().collect();
    let mut graph = Graph::new();
    for (module, file) in &modules {
        let text = fs::read_to_string(file).expect("a source file");
        let own = name(module);
        let others = graph.entry(own.clone()).or_default();
        others.extend(
            imported_modules(&text, module, &known)
                .iter()
                .map(&name)
                .filter(|other| *other != own),
        );
    }
    graph
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("a folder of sources");
    let paths = entries.map(|entry| entry.expect("an entry").path());
    paths
        .flat_map(|path| {
            if path.is_dir() {
                files(&path)
            } else {
                vec![path]
            }
        })
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .filter(|path| !path.components().any(|part| part.as_os_str() == "tests"))
        .collect()
}

fn module_of(file: &Path) -> Module {
    let path = file.with_extension("");
    let mut module = module(&path.to_string_lossy());
    if module.last().is_some_and(|last| last == "mod") {
        module.pop();
    }
    match module[..] {
        [ref only] if ["lib", "main", "property"].contains(&only.as_str()) => Module::new(),
        _ => module,
    }
}

/// The modules that a file's paths name, without those in its unit tests.
fn imported_modules(text: &str, own: &Module, known: &BTreeSet<Module>) -> BTreeSet<Module> {
    let code = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
    let code: String = code
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .collect::<Vec<_>>()
        .join("\n");
    let parent = &own[..own.len() - 1];
    let mut found = BTreeSet::new();
    for (start, base) in [
        ("crate::", &[][..]),
        ("super::", parent),
        ("self::", &own[..]),
    ] {
        for (at, _) in code.match_indices(start) {
            // A longer name can end in the word.
            let is_whole =
                !code[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_');
            if is_whole {
                for path in paths(&code[at + start.len()..]) {
                    let full: Vec<_> = base.iter().cloned().chain(path).collect();
                    found.extend(longest_known(&full, known).filter(|module| module != own));
                }
            }
        }
    }
    found
}

/// The paths at the start of a `use` tree or an expression: one, or one for each name in braces.
fn paths(text: &str) -> Vec<Module> {
    let end = text
        .find(|character: char| !(character.is_alphanumeric() || "_:".contains(character)))
        .unwrap_or(text.len());
    let path: Module = text[..end]
        .split("::")
        .filter(|part| !part.is_empty())
        .map(str::to_owned)
        .collect();
    if !text[end..].starts_with('{') {
        return vec![path];
    }
    let names = text[end + 1..].split('}').next().unwrap_or_default();
    names
        .split([',', '{'])
        .map(|name| {
            let name = name.trim().split([':', ' ']).next().unwrap_or_default();
            path.iter().cloned().chain([name.to_owned()]).collect()
        })
        .collect()
}

fn longest_known(path: &[String], known: &BTreeSet<Module>) -> Option<Module> {
    (1..=path.len())
        .rev()
        .map(|length| path[..length].to_vec())
        .find(|module| known.contains(module))
}

/// Finds a circle, if there is one.
fn find_circle(graph: &Graph) -> Option<String> {
    fn walk<'a>(
        graph: &'a Graph,
        node: &'a str,
        path: &mut Vec<&'a str>,
        done: &mut BTreeSet<&'a str>,
    ) -> Option<String> {
        if let Some(start) = path.iter().position(|passed| *passed == node) {
            path.push(node);
            return Some(path[start..].join(" -> "));
        }
        if !done.contains(node) {
            path.push(node);
            for next in graph.get(node).into_iter().flatten() {
                if let Some(found) = walk(graph, next, path, done) {
                    return Some(found);
                }
            }
            path.pop();
            done.insert(node);
        }
        None
    }
    let mut done = BTreeSet::new();
    graph
        .keys()
        .find_map(|node| walk(graph, node, &mut Vec::new(), &mut done))
}

/// Prints the rooms, the highest floor first, each with the rooms that it imports.
fn map(graph: &Graph) -> String {
    fn floor(graph: &Graph, node: &str) -> usize {
        let below = graph.get(node).into_iter().flatten();
        below.map(|next| floor(graph, next) + 1).max().unwrap_or(1)
    }
    let mut rooms: Vec<_> = graph
        .keys()
        .map(|node| (floor(graph, node), node))
        .collect();
    rooms.sort_by(|(left, one), (right, other)| right.cmp(left).then(one.cmp(other)));
    let lines = rooms.iter().map(|(floor, node)| {
        let others: Vec<_> = graph[*node].iter().map(String::as_str).collect();
        format!("{floor}  {node:<10} -> {}", others.join(", "))
    });
    let arrows: usize = graph.values().map(BTreeSet::len).sum();
    let heading = format!(
        "{} rooms, {arrows} imports; each room is above every room that it imports",
        rooms.len()
    );
    [heading]
        .into_iter()
        .chain(lines)
        .collect::<Vec<_>>()
        .join("\n")
}
