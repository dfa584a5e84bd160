from scepsy.capture import Patch


class Base:
    def say(self, what="nothing"):
        return f"said {what}"


class Below(Base):
    pass


def louder(patch):
    def say(self, *args, **kwargs):
        said = patch.original(self, *args, **kwargs)
        return said.upper() if patch.on else said

    return say


def test_a_method_of_a_class_its_own_or_inherited():
    for owner in (Base, Below):
        before = dict(vars(owner))
        patch = Patch(owner, "say", louder)
        assert owner().say(what="this") == "SAID THIS"
        assert owner.say.__wrapped__(owner(), "this") == "said this"
        patch.undo()
        assert dict(vars(owner)) == before


def test_a_method_of_one_object_only():
    mine, other = Below(), Below()
    patch = Patch(mine, "say", louder)
    assert (mine.say("this"), other.say("this")) == ("SAID THIS", "said this")
    patch.undo()
    assert vars(mine) == {}


def test_an_object_that_has_a_function_of_its_own_keeps_it():
    mine = Below()
    mine.say = lambda what: f"whispered {what}"
    patch = Patch(mine, "say", louder)
    assert mine.say("this") == "WHISPERED THIS"
    patch.undo()
    assert mine.say("this") == "whispered this"


def test_who_wraps_it_later_keeps_it_and_the_hook_falls_silent(monkeypatch):
    patch = Patch(Base, "say", louder)
    ours = Base.say
    monkeypatch.setattr(Base, "say", lambda self, what: f"<{ours(self, what)}>")
    assert Base().say("this") == "<SAID THIS>"
    patch.undo()
    assert Base().say("this") == "<said this>"
    monkeypatch.undo()
    Base.say = ours.__wrapped__
