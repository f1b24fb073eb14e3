use super::*;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

const LIST: &str =
    r#"{"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "bridge"}, {"type": "portmap"}]}"#;
const SINGLE: &str = r#"{"cniVersion": "0.3.1", "name": "s", "type": "ptp"}"#;

struct Dir {
    dir: tempfile::TempDir,
    conf: ConfDir,
}

impl Dir {
    fn new(files: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let conf = ConfDir::new(dir.path(), Path::new("/bpf"));
        Self { dir, conf }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.at(name)).unwrap()
    }

    fn names(&self) -> Vec<String> {
        files::names(self.dir.path()).unwrap()
    }

    /// The configuration that a runtime uses: the first that it would read.
    fn used(&self) -> (String, Vec<String>) {
        let name = self.names().into_iter().find(|name| extension(name).is_some()).unwrap();
        let list: serde_json::Value = serde_json::from_str(&self.text(&name)).unwrap();
        let plugins = list["plugins"].as_array().unwrap();
        (name, plugins.iter().map(|p| p["type"].as_str().unwrap().to_owned()).collect())
    }
}

#[test]
fn the_first_list_is_changed_and_no_other() {
    let dir = Dir::new(&[
        ("20-b.conflist", LIST),
        ("10-a.conflist", LIST),
        ("05-notes.txt", "x"),
        (".x.conflist.swp", "x"),
    ]);
    assert_eq!(dir.conf.add().unwrap(), Added::To(dir.at("10-a.conflist")));
    assert_eq!(dir.used().1, ["bridge", "portmap", "lb-cni"]);
    assert_eq!(dir.text("20-b.conflist"), LIST);
    let (before, inode) = (dir.text("10-a.conflist"), fs::metadata(dir.at("10-a.conflist")).unwrap().ino());
    assert_eq!(dir.conf.add().unwrap(), Added::Already(dir.at("10-a.conflist")));
    assert_eq!(fs::metadata(dir.at("10-a.conflist")).unwrap().ino(), inode, "not written again");
    assert_eq!(dir.text("10-a.conflist"), before);

    // Another one comes first now, as when a second CNI is installed.
    fs::write(dir.at("00-c.conflist"), LIST).unwrap();
    assert_eq!(dir.conf.add().unwrap(), Added::To(dir.at("00-c.conflist")));
    assert_eq!(dir.used().1, ["bridge", "portmap", "lb-cni"]);
    assert_eq!(dir.conf.remove().unwrap(), [dir.at("00-c.conflist"), dir.at("10-a.conflist")]);
    assert_eq!(dir.used().1, ["bridge", "portmap"]);
    assert_eq!(dir.conf.remove().unwrap(), Vec::<PathBuf>::new());
    assert_eq!(dir.names().len(), 5, "nothing left behind: {:?}", dir.names());
}

#[test]
fn a_single_configuration_gets_a_list_before_it_for_as_long_as_it_is_there() {
    for name in ["10-ptp.conf", "10-ptp.json", "10.a.conf"] {
        let dir = Dir::new(&[(name, SINGLE), ("20-b.conflist", LIST)]);
        let Added::To(made) = dir.conf.add().unwrap() else { panic!("{name}: nothing added") };
        let (used, types) = dir.used();
        assert_eq!((dir.at(&used), types), (made.clone(), vec!["ptp".into(), "lb-cni".into()]), "{name}");
        assert_eq!(dir.text(name), SINGLE);
        assert_eq!(dir.conf.add().unwrap(), Added::Already(made.clone()));

        // What its owner changes, changes.
        fs::write(dir.at(name), SINGLE.replace("\"s\"", "\"other\"")).unwrap();
        assert_eq!(dir.conf.add().unwrap(), Added::To(made.clone()));
        assert!(fs::read_to_string(&made).unwrap().contains("\"other\""));

        // A broken file changes nothing.
        fs::write(dir.at(name), "{").unwrap();
        let error = format!("{:#}", dir.conf.add().unwrap_err());
        assert!(error.contains(name) && error.contains("is not JSON"), "{error}");
        assert!(made.exists());

        fs::remove_file(dir.at(name)).unwrap();
        assert_eq!(dir.conf.add().unwrap(), Added::To(dir.at("20-b.conflist")));
        assert_eq!(dir.used().0, "20-b.conflist");

        fs::write(dir.at(name), SINGLE).unwrap();
        dir.conf.add().unwrap();
        assert_eq!(dir.conf.remove().unwrap().len(), 2);
        let mut left = vec![name.to_owned(), "20-b.conflist".into()];
        left.sort();
        assert_eq!(dir.names(), left);
    }
}

#[test]
fn what_a_former_list_was_made_of_may_be_gone_with_everything_else() {
    let dir = Dir::new(&[("10-x-lb-agent.conflist", LIST)]);
    assert_eq!(dir.conf.add().unwrap(), Added::None);
    assert!(dir.names().is_empty());
    assert_eq!(ConfDir::new(&dir.at("none"), Path::new("/bpf")).add().unwrap(), Added::None);
    assert!(ConfDir::new(&dir.at("none"), Path::new("/bpf")).remove().unwrap().is_empty());
}

#[test]
fn a_broken_file_is_not_touched_and_hides_no_other() {
    let broken = &LIST[..LIST.len() - 3];
    let dir = Dir::new(&[("10-a.conflist", broken), ("20-b.conflist", LIST)]);
    let error = format!("{:#}", dir.conf.add().unwrap_err());
    assert!(error.contains("10-a.conflist: is not JSON"), "{error}");
    // A runtime does not go on to the next file either.
    assert_eq!((dir.text("10-a.conflist").as_str(), dir.text("20-b.conflist").as_str()), (broken, LIST));
    fs::write(dir.at("10-a.conflist"), LIST).unwrap();
    dir.conf.add().unwrap();
    let half = &dir.text("10-a.conflist")[..120].to_owned();
    fs::write(dir.at("30-c.conflist"), dir.text("10-a.conflist")).unwrap();
    let torn = format!("{half} lb-cni");
    fs::write(dir.at("10-a.conflist"), &torn).unwrap();
    let error = format!("{:#}", dir.conf.remove().unwrap_err());
    assert!(error.contains("10-a.conflist"), "{error}");
    assert_eq!(dir.text("10-a.conflist"), torn);
    assert!(!dir.text("30-c.conflist").contains("lb-cni"), "the others are done all the same");
}

#[test]
fn rights_stay_and_links_are_followed() {
    let dir = Dir::new(&[("target", LIST)]);
    fs::set_permissions(dir.at("target"), fs::Permissions::from_mode(0o640)).unwrap();
    symlink("target", dir.at("10-a.conflist")).unwrap();
    dir.conf.add().unwrap();
    assert!(fs::symlink_metadata(dir.at("10-a.conflist")).unwrap().is_symlink());
    assert!(dir.text("target").contains("lb-cni"));
    assert_eq!(fs::metadata(dir.at("target")).unwrap().permissions().mode() & 0o777, 0o640);
    symlink("nowhere", dir.at("00-b.conflist")).unwrap();
    let error = format!("{:#}", dir.conf.add().unwrap_err());
    assert!(error.contains("00-b.conflist"), "{error}");
}

#[test]
fn what_somebody_writes_meanwhile_is_not_lost() {
    let dir = Dir::new(&[("10-a.conflist", LIST)]);
    let path = dir.at("10-a.conflist");
    let rewritten = std::cell::Cell::new(false);
    let changed = rewrite(&path, |text| {
        let result = conflist::add(text, Path::new("/bpf"));
        if !rewritten.replace(true) {
            fs::write(&path, LIST.replace("portmap", "bandwidth")).unwrap();
        }
        result
    });
    assert!(changed.unwrap());
    assert_eq!(dir.used().1, ["bridge", "bandwidth", "lb-cni"]);
}
