//! Which kernel modules a guest needs and in which order `insmod` can load them. Pure.
//!
//! The order comes from the kernel's own `modules.dep` (see depmod(8)), so that another kernel needs no change here.
//! Soft dependencies name aliases rather than modules and are not followed: a module which is needed only at run time,
//! by name, stands in [`ROOTS`] itself.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, bail};

/// A module the guest needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Root {
    /// As in `modprobe NAME`.
    pub(crate) name: &'static str,
    /// Whether the guest is of no use without it. What is optional is so because some kernels do not have it.
    pub(crate) required: bool,
}

const fn required(name: &'static str) -> Root {
    Root {
        name,
        required: true,
    }
}

const fn optional(name: &'static str) -> Root {
    Root {
        name,
        required: false,
    }
}

/// What soft-RoCE guests need; their dependencies are found by [`ModuleTable::load_order`].
pub(crate) const ROOTS: &[Root] = &[
    required("virtio_pci"),
    required("9p"),
    required("9pnet_virtio"),
    required("overlay"),
    // rxe asks the crypto API for "crc32" by name, up to the kernels where CRC32 is no crypto algorithm any more.
    optional("crc32_generic"),
    required("rdma_rxe"),
    required("rdma_ucm"),
    required("veth"),
    required("virtio_net"),
    // Loss, delay and reordering for the fault tests.
    optional("sch_netem"),
];

/// A kernel's `modules.dep` and `modules.builtin`, parsed.
#[derive(Debug, Default)]
pub(crate) struct ModuleTable {
    /// Path below the modules folder of each module, by canonical name.
    paths: BTreeMap<String, String>,
    /// Paths of what each module (by path) needs.
    needs: BTreeMap<String, Vec<String>>,
    builtin: BTreeSet<String>,
}

impl ModuleTable {
    /// Parses the text of `modules.dep` (`path: path path…`) and `modules.builtin` (`path`, one per line).
    pub(crate) fn parse(modules_dep: &str, modules_builtin: &str) -> Result<Self> {
        let mut table = Self::default();
        for line in modules_dep.lines().filter(|line| !line.trim().is_empty()) {
            let Some((path, needs)) = line.split_once(':') else {
                bail!("modules.dep: no colon in {line:?}");
            };
            table.paths.insert(canonical_name(path), path.to_owned());
            table.needs.insert(
                path.to_owned(),
                needs.split_whitespace().map(str::to_owned).collect(),
            );
        }
        table.builtin = modules_builtin.lines().map(canonical_name).collect();
        Ok(table)
    }

    /// Paths of `roots` and of all they need, each after everything it needs itself, none twice.
    pub(crate) fn load_order(&self, roots: &[Root]) -> Result<Vec<String>> {
        let mut order = Vec::new();
        let mut state = BTreeMap::new();
        for root in roots {
            let name = root.name.replace('-', "_");
            match self.paths.get(&name) {
                Some(path) => self.visit(path, &mut state, &mut order)?,
                None if self.builtin.contains(&name) || !root.required => {}
                None => bail!(
                    "this kernel has no module {:?}, and soft-RoCE guests cannot do without",
                    root.name
                ),
            }
        }
        Ok(order)
    }

    /// Depth first; `state` holds `false` for a module whose dependencies are being visited and `true` for a done one.
    fn visit(
        &self,
        path: &str,
        state: &mut BTreeMap<String, bool>,
        order: &mut Vec<String>,
    ) -> Result<()> {
        match state.get(path) {
            Some(true) => return Ok(()),
            Some(false) => bail!("modules.dep: {path} depends on itself"),
            None => {}
        }
        let Some(needs) = self.needs.get(path) else {
            bail!("modules.dep: {path} is needed but not listed");
        };
        state.insert(path.to_owned(), false);
        for need in needs {
            self.visit(need, state, order)?;
        }
        state.insert(path.to_owned(), true);
        order.push(path.to_owned());
        Ok(())
    }
}

/// `kernel/fs/9p/9p.ko.xz` → `9p`; dashes and underscores mean the same.
fn canonical_name(path: &str) -> String {
    let file = path.trim().rsplit('/').next().unwrap_or_default();
    file.split(".ko")
        .next()
        .unwrap_or_default()
        .replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "kernel/a.ko.xz: kernel/b.ko.xz kernel/sub/c-d.ko.xz\nkernel/b.ko.xz: kernel/sub/c-d.ko.xz\n\
                       kernel/sub/c-d.ko.xz:\nkernel/other.ko.xz: kernel/b.ko.xz\n";

    fn order(dep: &str, roots: &[Root]) -> Result<Vec<String>> {
        ModuleTable::parse(dep, "kernel/built-in.ko\n")?.load_order(roots)
    }

    #[test]
    fn each_module_follows_what_it_needs_and_comes_once() {
        let order = order(DEP, &[required("a"), required("other")]).unwrap();
        assert_eq!(
            order,
            [
                "kernel/sub/c-d.ko.xz",
                "kernel/b.ko.xz",
                "kernel/a.ko.xz",
                "kernel/other.ko.xz"
            ]
        );
    }

    #[test]
    fn dashes_and_underscores_are_the_same() {
        assert_eq!(
            order(DEP, &[required("c_d")]).unwrap(),
            ["kernel/sub/c-d.ko.xz"]
        );
        assert_eq!(
            order(DEP, &[required("c-d")]).unwrap(),
            ["kernel/sub/c-d.ko.xz"]
        );
    }

    #[test]
    fn builtin_and_optional_modules_may_be_absent_and_required_ones_not() {
        assert!(
            order(DEP, &[required("built_in"), optional("nowhere")])
                .unwrap()
                .is_empty()
        );
        let error = order(DEP, &[required("nowhere")]).unwrap_err().to_string();
        assert!(error.contains("nowhere"), "{error}");
    }

    #[test]
    fn broken_tables_are_refused() {
        assert!(
            order("x.ko: y.ko\ny.ko: x.ko\n", &[required("x")])
                .unwrap_err()
                .to_string()
                .contains("itself")
        );
        assert!(
            order("x.ko: y.ko\n", &[required("x")])
                .unwrap_err()
                .to_string()
                .contains("not listed")
        );
        assert!(order("nonsense\n", &[]).is_err());
    }
}
