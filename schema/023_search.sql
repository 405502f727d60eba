-- Search by any part of a name or an id, without regard to case. The indexes have no copy of the texts; the triggers
-- keep them in step. Deleted rows are found too: the statements leave them out.
CREATE VIRTUAL TABLE token_search USING fts5 (
	name, id, content = 'tokens', content_rowid = 'seq', tokenize = 'trigram', columnsize = 0
);
INSERT INTO token_search (token_search) VALUES ('rebuild');
CREATE TRIGGER token_search_added AFTER INSERT ON tokens BEGIN
	INSERT INTO token_search (rowid, name, id) VALUES (NEW.seq, NEW.name, NEW.id);
END;
CREATE TRIGGER token_search_changed AFTER UPDATE OF seq, name, id ON tokens
WHEN NEW.name <> OLD.name OR NEW.id <> OLD.id OR NEW.seq <> OLD.seq BEGIN
	INSERT INTO token_search (token_search, rowid, name, id) VALUES ('delete', OLD.seq, OLD.name, OLD.id);
	INSERT INTO token_search (rowid, name, id) VALUES (NEW.seq, NEW.name, NEW.id);
END;
CREATE TRIGGER token_search_removed AFTER DELETE ON tokens BEGIN
	INSERT INTO token_search (token_search, rowid, name, id) VALUES ('delete', OLD.seq, OLD.name, OLD.id);
END;

CREATE VIRTUAL TABLE project_search USING fts5 (
	name, id, content = 'projects', content_rowid = 'seq', tokenize = 'trigram', columnsize = 0
);
INSERT INTO project_search (project_search) VALUES ('rebuild');
CREATE TRIGGER project_search_added AFTER INSERT ON projects BEGIN
	INSERT INTO project_search (rowid, name, id) VALUES (NEW.seq, NEW.name, NEW.id);
END;
CREATE TRIGGER project_search_changed AFTER UPDATE OF seq, name, id ON projects
WHEN NEW.name <> OLD.name OR NEW.id <> OLD.id OR NEW.seq <> OLD.seq BEGIN
	INSERT INTO project_search (project_search, rowid, name, id) VALUES ('delete', OLD.seq, OLD.name, OLD.id);
	INSERT INTO project_search (rowid, name, id) VALUES (NEW.seq, NEW.name, NEW.id);
END;
CREATE TRIGGER project_search_removed AFTER DELETE ON projects BEGIN
	INSERT INTO project_search (project_search, rowid, name, id) VALUES ('delete', OLD.seq, OLD.name, OLD.id);
END;
